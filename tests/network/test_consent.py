"""The page on which an account is logged in and asked, as a browser uses it."""

from __future__ import annotations

import requests

from atproto_session.testing.network import LocalNetwork

from .raw import RawClient, query_of, tokens_of


def test_the_consent_page_is_plain_html_that_a_browser_can_use(network: LocalNetwork) -> None:
    account = network.create_account()
    client = RawClient(network.issuer)
    url = client.authorize_url(login_hint=account.handle, state='"><script>alert(1)</script>')
    page = requests.get(url, timeout=10)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script" not in page.text
    assert f'value="{account.handle}"' in page.text

    form = {**query_of(url), "identifier": account.handle, "password": '"><b>wrong', "decision": "approve"}
    answer = requests.post(f"{network.issuer}/oauth/authorize", data=form, timeout=10)
    assert answer.status_code == 401
    assert "Invalid identifier or password" in answer.text
    form["identifier"] = '"><b>nobody'
    answer = requests.post(f"{network.issuer}/oauth/authorize", data=form, timeout=10)
    assert "<b>" not in answer.text
    assert "&quot;&gt;&lt;b&gt;nobody" in answer.text

    form |= {"identifier": f" @{account.handle} ", "password": account.password}
    answer = requests.post(f"{network.issuer}/oauth/authorize", data=form, timeout=10, allow_redirects=False)
    assert answer.status_code == 303
    assert tokens_of(client.exchange(query_of(answer.headers["Location"])["code"])).response["sub"] == account.did
    assert requests.get(url, timeout=10).status_code == 400
