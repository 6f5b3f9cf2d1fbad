"""A project that has forgotten the pages of the log-in."""

urlpatterns: list[object] = []
