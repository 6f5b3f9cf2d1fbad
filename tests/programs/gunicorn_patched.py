"""A configuration of gunicorn's: gevent patches before the application is imported, ``--preload`` or not."""

from gevent import monkey

monkey.patch_all()
