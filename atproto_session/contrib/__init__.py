"""What joins the library to others. Each module needs the extra of its name, and none is imported by ``import atproto_session``."""
