"""A lesson in a real JupyterLab in a real Chromium: it runs, and turning rank and alpha redraws the picture.

`make test-browser`; needs Chromium or Chrome on the PATH, or its path in the variable CHROMIUM.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LESSON = "02_lora.ipynb"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
MINUTE = 60_000  # Playwright counts milliseconds

# JupyterLab's own view of the notebook that is open: which code cells have not run yet, and which failed unplanned.
STATE = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells
        .filter(cell => cell.cell_type === 'code' && [].concat(cell.source).join('').trim());
    const planned = cell => (cell.metadata.tags || []).includes('raises-exception');
    return {
        waiting: cells.filter(cell => !cell.execution_count).length,
        failed: cells.flatMap(cell => planned(cell) ? [] : cell.outputs.filter(o => o.output_type === 'error'))
            .map(output => output.ename + ': ' + output.evalue),
    };
}"""
# The bytes that an <img> shows now, as text. Its address alone would not do: it changes with each update.
PICTURE = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(bytes, b => b.toString(16)).join(' ');
}"""


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium: install it (Debian: apt-get install chromium) or give its path in CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def jupyterlab(root: Path, folder: Path):
    """JupyterLab serving `root` with nothing of the user's settings; gives its address and token."""
    settings = folder / "settings"
    for plugin, values in {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
        "notebook-extension/tracker": {"windowingMode": "none"},  # else cells out of sight are not in the page
    }.items():
        file = settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_TOKEN": token,
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    log = folder / "jupyterlab.log"
    with log.open("w") as sink:
        server = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()}"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=1).close()
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"JupyterLab did not answer in a minute:\n{log.read_text()}")
        yield address, token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def open_and_run(page, address: str, token: str, name: str) -> None:
    """Open a notebook and run all of its cells, as a reader would from the menu."""
    page.goto(f"{address}/lab/tree/{name}?token={token}&reset", timeout=2 * MINUTE)
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=2 * MINUTE)
    # "Run All Cells" before the kernel is there would ask for one in a dialog.
    page.evaluate("""async () => {
        const notebook = window.jupyterapp.shell.currentWidget;
        await notebook.context.ready;
        await notebook.sessionContext.ready;
        await notebook.sessionContext.session.kernel.info;
    }""")
    # Stored outputs and numbers away: what is there afterwards comes from this run.
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    assert page.evaluate(STATE)["waiting"]
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def wait_until_run(page, minutes: float = 8) -> None:
    end = time.monotonic() + 60 * minutes
    while (state := page.evaluate(STATE))["waiting"] and not state["failed"] and time.monotonic() < end:
        page.wait_for_timeout(250)
    assert state == {"waiting": 0, "failed": []}


def picture_after(image, old: str, seconds: float = 60) -> str:
    """The picture that follows `old`, once it has stood still; fails when none comes."""
    page, end = image.page, time.monotonic() + seconds
    last = old
    while time.monotonic() < end:
        page.wait_for_timeout(400)
        try:
            now = image.evaluate(PICTURE)
        except Exception as error:  # the address that was just read has been replaced by a newer picture's
            if "fetch" not in str(error):
                raise
            continue
        if now != old and now == last:
            return now
        last = now
    pytest.fail("the picture did not change")


def turn(slider) -> tuple[float, float]:
    """One step by keyboard, towards the side where there is room; gives the value before and after."""
    slider.focus()
    before, top = (float(slider.get_attribute(name)) for name in ("aria-valuenow", "aria-valuemax"))
    slider.press("ArrowRight" if before < top else "ArrowLeft")
    for _ in range(50):
        after = float(slider.get_attribute("aria-valuenow"))
        if after != before:
            break
        slider.page.wait_for_timeout(100)
    return before, after


def test_lesson_runs_and_its_rank_and_alpha_sliders_redraw(browser, tmp_path):
    root = tmp_path / "notebooks"
    shutil.copytree(NOTEBOOKS, root, ignore=shutil.ignore_patterns(".*", "output"))
    assert (root / LESSON).is_file(), f"{LESSON} is missing in notebooks/"
    with jupyterlab(root, tmp_path) as (address, token):
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        open_and_run(page, address, token, LESSON)
        wait_until_run(page)

        # the first widget that has a picture and sliders for rank and alpha
        explorer = page.locator(".jupyter-widgets.widget-vbox").filter(has=page.locator("img"))
        for word in ("rank", "alpha"):
            explorer = explorer.filter(has=page.locator(".widget-hslider").filter(has_text=re.compile(word)))
        explorer = explorer.first
        explorer.wait_for(timeout=MINUTE)
        explorer.scroll_into_view_if_needed()
        image = explorer.locator("img").first
        pictures = [picture_after(image, "")]
        for word in ("rank", "alpha"):
            slider = explorer.locator(".widget-hslider").filter(has_text=re.compile(word)).get_by_role("slider")
            before, after = turn(slider)
            assert after != before, f"the slider for {word} did not move"
            pictures.append(picture_after(image, pictures[-1]))
        page.screenshot(path=tmp_path / "explorer.png")
        assert len(set(pictures)) == 3
        assert not problems
