"""Headless Chromium, as people use it: Debian's ``chromium`` and ``chromium-driver``, driven by selenium."""

from __future__ import annotations

import os
import shutil
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.cookies import SimpleCookie
from typing import Any

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException, WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.wait import WebDriverWait
from werkzeug.serving import make_server

from atproto_session.testing.network import Account

from .core import SOON

#: It has no network but this machine's, and looks for none.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-proxy-server",
    "--disable-features=Translate,OptimizationHints,PasswordManagerOnboarding",
    "--window-size=900,900",
)


def _require_programs() -> None:
    """Skip the test where there is no Chromium, but not in CI."""
    missing = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    if not missing:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{' and '.join(missing)} not found, which CI needs")
    pytest.skip("needs a browser: apt-get install chromium chromium-driver")


class Chromium:
    """A browser that knows nobody yet.

    :param hosts: host names that lead to a port of this machine, such as ``{"app.example.com": 8443}``; all others but
        ``localhost`` lead nowhere. Any certificate is good.
    """

    def __init__(self, hosts: dict[str, int] | None = None) -> None:
        _require_programs()
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        known = [f"MAP {host} 127.0.0.1:{port}" for host, port in (hosts or {}).items()]
        rules = ", ".join([*known, "MAP * ~NOTFOUND", "EXCLUDE localhost", "EXCLUDE 127.0.0.1"])
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        options.accept_insecure_certs = True
        for flag in (*_FLAGS, f"--user-data-dir={self._folder.name}", f"--host-resolver-rules={rules}"):
            options.add_argument(flag)
        self.driver = Chrome(options, Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(SOON)

    def close(self) -> None:
        self.driver.quit()
        self._folder.cleanup()

    def forget(self) -> None:
        """Close all tabs but one, and forget every cookie and page."""
        first, *others = self.driver.window_handles
        for tab in others:
            self.driver.switch_to.window(tab)
            self.driver.close()
        self.driver.switch_to.window(first)
        self.open("about:blank")
        self.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.driver.execute_cdp_cmd("Network.clearBrowserCache", {})

    # Pages

    @property
    def url(self) -> str:
        return str(self.driver.current_url)

    @property
    def text(self) -> str:
        """What a person reads on the page."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    @property
    def framed(self) -> str:
        """The address of what the first frame of the page shows."""
        self.driver.switch_to.frame(0)
        try:
            return str(self.driver.execute_script("return location.href"))
        finally:
            self.driver.switch_to.default_content()

    def open(self, url: str) -> None:
        """Until all that belongs to the page is there."""
        self.driver.get(url)

    def find(self, css: str) -> WebElement:
        """The first element that there is, or will be, and can be seen."""

        def visible(driver: Any) -> WebElement | None:
            return next(
                (element for element in driver.find_elements(By.CSS_SELECTOR, css) if element.is_displayed()), None
            )

        found: WebElement = self._wait(visible, f"there is no {css}")
        return found

    def fill(self, name: str, value: str) -> None:
        """Type into the field ``name``."""
        field = self.find(f'[name="{name}"]')
        field.clear()
        field.send_keys(value)

    def press(self, label: str) -> None:
        """Press the button, or follow the link, that says ``label``, and go on when the page has changed."""
        path = f'//button[normalize-space()="{label}"] | //a[normalize-space()="{label}"]'

        def pressed(driver: Any) -> bool:
            for element in driver.find_elements(By.XPATH, path):
                if element.is_displayed() and element.is_enabled():
                    element.click()
                    return True
            return False

        self._wait(pressed, f"there is no button {label}")

    def send_form(self, action: str, /, **values: str) -> None:
        """As the people do who know how to change a page: send a form of their own, with the token of Django's that is
        in the page. Until the answer is there."""
        page = self.driver.find_element(By.TAG_NAME, "html")
        self.driver.execute_script(
            """
            const form = document.createElement("form"), token = document.querySelector("[name=csrfmiddlewaretoken]");
            Object.assign(form, {method: "post", action: arguments[0]});
            for (const [name, value] of Object.entries({...arguments[1], csrfmiddlewaretoken: token.value}))
                form.append(Object.assign(document.createElement("input"), {name, value}));
            document.body.append(form);
            form.submit();
            """,
            action,
            values,
        )
        self._wait(staleness_of(page), f"{action} does not answer")

    def wait_for(self, text: str) -> None:
        """Until a person reads ``text``."""
        self._wait(lambda _: text in self.text, f"the page does not say {text!r}")

    def sign_in(self, application: str, pds: str, account: Account) -> None:
        """From the home page of an application to the consent page of the real PDS."""
        self.open(application)
        self.fill("account", account.handle)
        self.press("Log in")
        self.wait_for_url(pds)
        self.fill("password", account.password)
        self.press("Sign in")

    def wait_for_url(self, start: str) -> None:
        """Until the address begins with ``start``."""
        self._wait(lambda _: self.url.startswith(start), f"the browser does not come to {start}")

    def _wait(self, condition: Any, problem: str) -> Any:
        ignored = (NoSuchElementException, StaleElementReferenceException)
        try:
            return WebDriverWait(self.driver, SOON, 0.05, ignored).until(condition)
        except WebDriverException as error:
            with suppress(WebDriverException):
                problem += f"; at {self.url}: {self.text[:500]}"
            raise AssertionError(problem) from error

    # Tabs and cookies

    @contextmanager
    def tab(self) -> Iterator[None]:
        """In the block, another tab is in front. It stays open."""
        before = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        yield
        self.driver.switch_to.window(before)

    def cookies(self) -> dict[str, str]:
        """Those of the page's host, with those that no script sees."""
        return {cookie["name"]: cookie["value"] for cookie in self.driver.get_cookies()}

    def set_cookie(self, name: str, value: str) -> None:
        """For the page's host."""
        self.driver.add_cookie({"name": name, "value": value, "path": "/"})


@contextmanager
def served(wsgi: Any, host: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A WSGI application on a free port, each request in a thread; the origin that it is at.

    :param host: ``"127.0.0.1"`` or ``"localhost"``; or one that the browser was told of.
    :param tls: for https.
    """
    server = make_server("127.0.0.1", 0, wsgi, threaded=True, ssl_context=tls)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://{host}:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def foreign(html: str, host: str = "127.0.0.1") -> Iterator[str]:
    """A page of somebody else, on another port of the same host: what it sends comes with all cookies, ``SameSite`` or
    not, and it is told the cookies itself. ``%token%`` in it is the token of Django's that it has found there."""

    def application(environ: Any, start_response: Any) -> list[bytes]:
        cookies = SimpleCookie(environ.get("HTTP_COOKIE", ""))
        token = cookies["csrftoken"].value if "csrftoken" in cookies else ""
        start_response("200 OK", [("Content-Type", "text/html")])
        return [f"<!doctype html>{html}".replace("%token%", token).encode()]

    with served(application, host) as origin:
        yield origin
