"""What joins the library to others. Each module needs the extra of its name; the library itself imports none."""
