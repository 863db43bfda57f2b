"""A real browser for tests and screenshots: the system's Chromium, and axe-core fetched like htmx."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedserver.dashboard.vendor import Package, VendorError, fetch

VENDOR = Path(__file__).resolve().parent / "vendor"
AXE = Package(
    "axe-core",
    "4.14.1",
    "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
    (("axe.min.js", "axe.min.js"),),
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW = "a Chromium is needed: `make chromium` installs Debian's, or put one on PATH"


def chromium() -> str:
    """Where the browser is.

    Raises:
        FileNotFoundError: nowhere; with what to do.
    """
    for name in NAMES:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(HOW)


def axe() -> str:
    """The source of axe-core."""
    fetch([AXE], VENDOR)
    return (VENDOR / "axe.min.js").read_text(encoding="utf-8")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser that reaches nothing but loopback."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium(),
            # A container's root has no sandbox of its own; the proxy refuses every other host.
            args=["--no-sandbox", "--disable-dev-shm-usage"],
            proxy={"server": "http://127.0.0.1:9", "bypass": "127.0.0.1"},
        )
        try:
            yield launched
        finally:
            launched.close()


if __name__ == "__main__":
    try:
        print(chromium())
        axe()
    except (FileNotFoundError, VendorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
