"""Opens pages in Debian's Chromium as a user would, and notes whatever is wrong with them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


def chromium() -> str | None:
    """The browser on PATH, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Pages:
    """Call it with a path or a URL to get the open page.

    Attributes:
        problems: One line for each console error, exception, failed request and request that would leave the machine. A
            test that wants one takes it out; any that is left fails the test.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        expect.set_options(timeout=300_000)  # as below
        self._pages: list[Page] = []
        self.problems: list[str] = []

    def __call__(self, path_or_url: str | Path, width: int = 1200, dark: bool = False) -> Page:
        context = self._browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            service_workers="block",
            locale="en-GB",
        )
        context.set_default_timeout(300_000)  # milliseconds; a busy machine is slow, and nothing here is timed
        context.route("**/*", self._stay_here)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and self._note("console", message.text))
        page.on("pageerror", lambda error: self._note("exception", str(error)))
        page.on("requestfailed", self._failed)
        self._pages.append(page)
        page.goto(address(path_or_url), wait_until="load")
        return page

    def settle(self) -> None:
        """Wait for what the pages still have to say."""
        for page in self._pages:
            if not page.is_closed():
                page.wait_for_timeout(50)

    def _note(self, kind: str, text: str) -> None:
        self.problems.append(f"{kind}: {text}")

    def _failed(self, request: Request) -> None:
        if is_local(request.url) and request.failure != "net::ERR_ABORTED":  # what leaving a page breaks off
            self._note("request failed", f"{request.url} ({request.failure})")

    def _stay_here(self, route: Route) -> None:
        if is_local(route.request.url):
            route.continue_()
        else:
            self._note("request off this machine", route.request.url)
            route.abort()


def address(path_or_url: str | Path) -> str:
    """A URL as it is, a path as ``file://``."""
    text = str(path_or_url)
    return text if "://" in text else Path(text).resolve().as_uri()


def is_local(url: str) -> bool:
    """Whether a browser gets this without leaving the machine."""
    parts = urlsplit(url)
    return parts.scheme not in {"http", "https", "ws", "wss", "ftp"} or parts.hostname in LOCAL_HOSTS


@contextmanager
def opened_pages(executable: str) -> Iterator[Pages]:
    """A headless browser with a fresh profile."""
    with (
        sync_playwright() as driver,
        driver.chromium.launch(executable_path=executable, args=list(ARGUMENTS)) as browser,
    ):
        yield Pages(browser)
