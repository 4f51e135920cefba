"""Notebooks in a real browser: JupyterLab on a loopback port, Chromium driven by playwright, clicks and keys only.

With CAF_SCREENSHOTS=FOLDER the pictures of the site are written there (`python tools/screenshots.py`).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURE = "() => document.querySelector('.caf-explorer canvas').toDataURL()"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("anywidget", reason="the extra widgets is not installed")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a server, and its folder: the notebooks, and one with the explorer."
    folder, aside, free = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("aside"), socket.socket()
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    for name in ("index", "table1", "figure6"): shutil.copy(ROOT / f"nbs/{name}.ipynb", folder)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, code in (("explorer", "import caf_nb.widgets\ncaf_nb.widgets.explore(steps=4)"), ("bar", "from caf_nb.core import tqdm\nfor _ in tqdm(range(9)): pass")):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=kernel), folder / f"{name}.ipynb")
    (aside / "config/labconfig").mkdir(parents=True)
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}  # the question about news
    (aside / "config/labconfig/page_config.json").write_text(json.dumps(quiet))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(aside / "config"), "IPYTHONDIR": str(aside / "ipython")}
    with open(aside / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
            except OSError: time.sleep(0.5)
            else: break
        else: pytest.fail((aside / "log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/lab/tree", folder
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(240_000)
        yield page
        browser.close()


def shoot(page, name):
    "A picture for the site, where one is wanted."
    if folder := os.environ.get("CAF_SCREENSHOTS"): page.screenshot(path=f"{folder}/{name}.jpg", type="jpeg", quality=80)


def test_a_slider_changes_the_picture(lab, page):
    page.goto(f"{lab[0]}/explorer.ipynb?reset")
    page.locator(".jp-Notebook .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    page.locator(".caf-explorer canvas").wait_for()
    page.wait_for_function("() => /MI .*SCD/.test(document.querySelector('.caf-status').textContent)")
    first = page.evaluate(PICTURE)
    slider = page.get_by_label("l1_ir", exact=True)
    slider.focus()
    page.keyboard.press("End")
    page.wait_for_function("before => document.querySelector('.caf-explorer canvas').toDataURL() !== before", arg=first)
    page.wait_for_function("() => /^24 steps/.test(document.querySelector('.caf-status').textContent)")
    moved = page.evaluate(PICTURE)
    page.get_by_label("View", exact=True).select_option("difference")
    page.wait_for_function("before => document.querySelector('.caf-explorer canvas').toDataURL() !== before", arg=moved)
    page.get_by_role("button", name="hand-crafted").click()
    page.wait_for_function("() => document.querySelector('[aria-label=l1_ir]').value === '0'")
    page.get_by_label("View", exact=True).select_option("side by side")
    shoot(page, "explorer")


@pytest.mark.long
def test_a_bar_is_a_widget(lab, page):
    page.goto(f"{lab[0]}/bar.ipynb?reset")
    page.locator(".jp-Notebook .cm-content").first.click()
    page.get_by_text("| Idle").first.wait_for()
    page.keyboard.press("Shift+Enter")
    page.locator(".jp-OutputArea-output .widget-hprogress").wait_for()
    page.get_by_text("9/9").wait_for()
    assert not page.locator(".jp-OutputArea-output[data-mime-type*=stderr]").count()


@pytest.mark.long
@pytest.mark.parametrize("name, shown", [("index", "img"), ("table1", "table"), ("figure6", "img")])
def test_run_by_the_menu(lab, page, name, shown):
    "Every cell runs without an error, the notebook is saved with its outputs by Ctrl-S, and there is something to look at."
    page.goto(f"{lab[0]}/{name}.ipynb?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("| Idle").first.wait_for()  # before it, JupyterLab asks which kernel is meant
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    file, limit = lab[1] / f"{name}.ipynb", time.monotonic() + 900
    while time.monotonic() < limit:
        page.wait_for_timeout(2000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        code = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
        failed = [output["ename"] for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
        assert not failed, failed
        if all(cell["execution_count"] for cell in code): break
    else: pytest.fail(f"{sum(not cell['execution_count'] for cell in code)} cells did not run")
    if shown == "table": page.keyboard.press("Control+b")  # wide: without the list of files
    seen = page.locator(f".jp-OutputArea-output {shown}").first
    seen.scroll_into_view_if_needed()
    assert seen.bounding_box()["height"] > 50
    shoot(page, name)
