"""Log-in with AT Protocol accounts for Django, and the accounts' servers in views.

::

    INSTALLED_APPS = [..., "atproto_session.contrib.django"]
    MIDDLEWARE = [..., "atproto_session.contrib.django.middleware.ATProtoMiddleware"]
    AUTHENTICATION_BACKENDS = [..., "atproto_session.contrib.django.backends.ATProtoBackend"]
    ATPROTO_SESSION = {"NAME": "Example", "SCOPE": "atproto transition:generic"}

    urlpatterns = [..., path("atproto/", include("atproto_session.contrib.django.urls"))]

Nothing here looks at the settings, or opens the store, before it is needed: ``migrate`` and ``check`` need no key.
"""
