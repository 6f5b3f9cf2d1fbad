from flask import Flask

from atproto_session.contrib.flask import ATProto, current_account, login_required

app = Flask(__name__)
app.config["SECRET_KEY"] = "change me"
ATProto(app)


@app.get("/")
@login_required
def home():
    return f"Hello {current_account.handle}"
