"""What the app tells of.

``logged_in``
    An account has logged in, or was linked to its user. ``sender`` is the class :class:`.models.Account`; arguments:
    ``request``, ``user``, ``account`` (an ``Account``), ``session`` (the :class:`.OAuthSession`), ``is_new`` (whether
    the account was unknown before).
``logged_out``
    A browser has ended its session of an account. Arguments: ``request``, ``user`` (or ``None``), ``did``.
``session_over``
    A session has ended that nobody signed out: its server refused to go on. Sent in a thread of the library, where and
    when that was found, so in a worker, too. Arguments: ``did``, ``session_id``, ``cause`` (the error that says why).
"""

from __future__ import annotations

from django.dispatch import Signal

logged_in = Signal()
logged_out = Signal()
session_over = Signal()
