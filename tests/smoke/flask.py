"""The extra ``flask`` alone: a log-in as far as it goes without a network."""

from flask import Flask

from atproto_session.contrib.flask import ATProto

app = Flask("smoke")
app.config.update(SECRET_KEY="for tests", ATPROTO_STORE="memory:", ATPROTO_PUBLIC_URL="https://app.example.com")
ATProto(app)
browser = app.test_client()
form = browser.get("/atproto/login")
if form.status_code != 200 or 'name="account"' not in form.text:
    raise SystemExit(f"no form: {form.text}")
document = browser.get("/atproto/oauth-client-metadata.json").get_json()
if document["client_id"] != "https://app.example.com/atproto/oauth-client-metadata.json":
    raise SystemExit(f"no document: {document}")
refused = browser.post("/atproto/login", data={"account": "nobody"})
if refused.status_code != 400 or "is not a handle" not in refused.text:
    raise SystemExit(f"no problem: {refused.text}")
