"""The extra ``cli`` alone."""

from atproto_session.cli import main

try:
    main(["--help"])
except SystemExit as ended:
    if ended.code != 0:
        raise
