"""The refresh protocol as a small state machine, and a search through all that it can come to.

:mod:`.protocol` has the steps of :mod:`atproto_session.session_getter`, one for each access to what the workers share,
and says what must never happen. :mod:`.search` goes through every order in which the steps of some workers, a log-out
and a log-in can follow each other, with a crash possible before each and an answer lost at every request.

``python -m tests.model --workers 3 --lease`` goes further than the tests have time for.
"""
