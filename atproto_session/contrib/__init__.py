"""What joins the library to others. Each module needs the extra of its name."""
