"""A real headless Chromium for the tests marked `browser`: found, or installed by root; else they are skipped by name."""

import shutil

import pytest
from debian import have

ARGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ARGS += " --disable-component-update --disable-sync"


def chromium():
    """The path of Chromium."""
    if not have(["chromium"], ["chromium"]):
        pytest.skip("needs chromium on PATH, or root and apt-get to install it")
    return shutil.which("chromium")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGS.split())
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """`opened(path, **context)` is a page with that file. None may log an error, or ask for anything but its own file."""
    contexts, wrong = [], []

    def open_file(path, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(300_000)  # ms: what is waited for is an event, on a machine however busy
        address = path.resolve().as_uri()
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.split("#")[0] == address or wrong.append(request.url))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not wrong
