"""Pictures of the real app for the README: `make screenshots`. Starts a server, trains the starter model, looks at every page.

Every picture is made in a desktop and a phone width, in light and dark; those that the README shows are among them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

from benchmarks.page import FLAGS, choose, open_when_ready, server  # noqa: E402
from trainer.run import status  # noqa: E402
from trainer.workspace import Workspace  # noqa: E402

IMAGES = ROOT / "docs" / "images"
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")


def every_look(browser: Browser, address: str, path: str, name: str, settle_s: float = 3.0) -> None:
    """One page in both widths and both schemes."""
    for size, (width, height) in SIZES.items():
        for scheme in SCHEMES:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.goto(f"{address}{path}")
            page.wait_for_timeout(settle_s * 1000)
            page.screenshot(path=IMAGES / f"{name}-{size}-{scheme}.png")
            context.close()


def smoke_card(browser: Browser, address: str) -> None:
    """The Train page with model and data chosen, then with the report card of its smoke test open."""
    for scheme in SCHEMES:
        context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.goto(address)
        choose(page, "Model", "starter")
        choose(page, "Data", "starter")
        page.wait_for_timeout(4000)
        page.screenshot(path=IMAGES / f"train-desktop-{scheme}.png")
        page.get_by_role("button", name="Smoke test").first.click()
        verdict = "document.querySelector('#gate-lines [data-code=smoke]')?.textContent ?? ''"
        page.wait_for_function(f"/passed|failed/.test({verdict})", timeout=180_000)
        page.wait_for_timeout(1500)
        _open_details(page)
        page.screenshot(path=IMAGES / f"smoke-desktop-{scheme}.png")
        context.close()


def _open_details(page: Page) -> None:
    page.evaluate(
        "() => document.querySelectorAll('#gate-lines [data-code=smoke] details').forEach(d => d.open = true)"
    )
    page.evaluate("() => scrollTo(0, 0)")
    page.wait_for_timeout(500)


def main() -> None:
    """Take all pictures."""
    IMAGES.mkdir(exist_ok=True)
    folder = Path(tempfile.gettempdir()) / "signalbox-demo"  # its path can be read in some pictures
    shutil.rmtree(folder, ignore_errors=True)
    workspace = Workspace(folder / "ws").create()
    with sync_playwright() as playwright, server(workspace.root) as (address, _):
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_context().new_page()
        open_when_ready(page, address, first_time=True)
        page.wait_for_timeout(1000)
        every_look(browser, address, "", "empty", 2.0)
        page.get_by_role("button", name="Try it now").first.click()
        page.wait_for_url("**/live?run=*", timeout=120_000)
        run = workspace.list_runs()[0]
        while status(run).current_step < 120 and status(run).state in ("preparing", "running"):
            time.sleep(0.5)
        every_look(browser, address, f"live?run={run.run_id}", "live")
        page.goto(f"{address}live?run={run.run_id}")
        page.get_by_role("button", name="Stop", exact=True).first.click()
        page.get_by_role("button", name="Save and stop").first.click()
        while status(run).state != "stopped":
            time.sleep(0.2)
        every_look(browser, address, f"live?run={run.run_id}", "stopped")
        smoke_card(browser, address)
        every_look(browser, address, "", "form", 5.0)
        page.goto(f"{address}data")
        page.get_by_role("button", name="Check", exact=True).first.click()
        page.get_by_text("rows are usable").first.wait_for(timeout=60_000)
        for name in ("runs", "data", "models"):
            every_look(browser, address, name, name)
        browser.close()
    shutil.rmtree(folder)
    print(f"{len(list(IMAGES.glob('*.png')))} pictures in {IMAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
