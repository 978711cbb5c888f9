"""
A real browser on the demo page, for the tests and for the picture in the README:

    python tests/demo_browser.py DETECTOR IMAGE [IMAGE ...] --output demo.png
"""

import argparse
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
REMEDY = "no Chromium on this machine: apt-get install chromium, or uv run playwright install chromium"
TIMEOUT = 120_000  # milliseconds; the machine may be busy


def find_chromium() -> str | None:
    """Path of the machine's own, or of the one that playwright has installed."""
    own = next((path for path in map(shutil.which, NAMES) if path), None)
    if own:
        return own
    with sync_playwright() as playwright:
        installed = playwright.chromium.executable_path
    return installed if Path(installed).is_file() else None


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    """A headless browser with a camera that shows a test picture, and without any road to the outside."""
    options = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        # A proxy that is not there: what is not on this machine cannot be reached, as on one without network.
        browser = playwright.chromium.launch(
            executable_path=path, args=options, proxy={"server": "127.0.0.1:9", "bypass": "127.0.0.1"}
        )
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, url: str) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.goto(url)
    # Gradio fetches each kind of part on its own, so they come in any order.
    for part in ("#files input[type=file]", "#summary", "#picture", "#table [role=grid]", "#confidence input"):
        page.wait_for_selector(part, state="attached")
    return page


def drop(page: Page, files: Sequence[str | os.PathLike], where: str = "files") -> None:
    page.set_input_files(f"#{where} input[type=file]", [os.fspath(file) for file in files])


def wait_for_summary(page: Page, text: str | re.Pattern[str]) -> str:
    """What the page says, once it says `text`."""
    expect(page.locator("#summary")).to_contain_text(text, use_inner_text=True, timeout=TIMEOUT)
    return page.inner_text("#summary")


def main() -> None:
    from dit_detection.demo.page import launch, load_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--output", default="demo.png")
    args = parser.parse_args()
    path = find_chromium()
    if path is None:
        parser.error(REMEDY)
    served = load_page(args.detector)
    launch(served, prevent_thread_lock=True, quiet=True)
    try:
        with chromium(path) as browser:
            page = open_page(browser, served.local_url)
            drop(page, args.images)
            wait_for_summary(page, args.images[0].name)
            page.wait_for_selector("#picture img")
            page.wait_for_function("[...document.images].every(image => image.complete)")
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # what fades in
            page.screenshot(path=args.output, full_page=True)
    finally:
        served.close()


if __name__ == "__main__":
    main()
