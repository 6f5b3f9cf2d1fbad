"""An exhaustive search through the protocols of :mod:`atproto_session.refresh` and :mod:`atproto_session._records`.

It drives the generators themselves. :mod:`.protocols` finds out where each can stand. :mod:`.world` has what they
share, what can be next and what must never happen. :mod:`.search` goes through every order of steps, and
:mod:`.mechanisms` takes out one mechanism at a time, to see that it is needed.

``make model`` goes further than the tests have time for.
"""
