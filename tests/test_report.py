"""The report as its users run it: what is run, what is not run again, and the page."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from caf_nb.cli import report_app
from caf_nb.config import Profile
from caf_nb.report import Ledger, Ran, build_report, run_notebook, write_page
from caf_nb.report import compare, paper_table, show_table

ROOT = Path(__file__).resolve().parents[1]
GIVEN = ("profile = 'mini'; out = ''", ["parameters"])


def notebook(path: Path, *cells: tuple[str, list[str]]) -> Path:
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    made = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": tags}, "source": source, "outputs": [], "execution_count": None} for i, (source, tags) in enumerate(cells)]
    path.write_text(json.dumps({"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.mark.slow
def test_what_has_not_changed_is_not_run_again(tmp_path):
    "One notebook works, one fails: both are on the page, and the second time only the failing one runs."
    (tmp_path / "nbs").mkdir()
    notebook(tmp_path / "nbs/figure9.ipynb", GIVEN, ("print('running in', profile)", []))
    notebook(tmp_path / "nbs/table1.ipynb", GIVEN, ("1 / 0", []))

    def report(**more):
        page, ran = build_report("smoke", tmp_path / "out", tmp_path / "nbs", progress=False, **more)
        return page.read_text(), {r.name: r for r in ran}
    text, ran = report()
    assert list(ran) == ["table1", "figure9"] and ran["table1"].error == "ZeroDivisionError: division by zero" and not ran["figure9"].error
    assert all(words in text for words in ("running in smoke", "This notebook stopped: ZeroDivisionError", "wiring only"))
    _, ran = report()
    assert ran["table1"].error and ran["figure9"].reused
    assert set(Ledger.read(tmp_path / "out/notebooks/done.json").done) == {"figure9"}
    notebook(tmp_path / "nbs/table1.ipynb", GIVEN, ("print('repaired')", []))
    text, ran = report(fresh=True)
    assert "repaired" in text and not any(r.error or r.reused for r in ran.values())


@pytest.mark.slow
def test_a_kernel_that_dies_is_told(tmp_path):
    heard = []
    path = notebook(tmp_path / "a.ipynb", GIVEN, ("import sys; print('almost', file=sys.stderr, flush=True)", []), ("import os; os._exit(3)", []))
    why = run_notebook(path, tmp_path / "ran.ipynb", {"profile": "smoke"}, 1, heard.append)
    assert "died" in why.lower() and "almost" in heard


@pytest.mark.slow
def test_an_interrupted_report_stops_its_notebooks(tmp_path):
    "After SIGINT to the report alone, no process of it is left, kernels included."
    (tmp_path / "nbs").mkdir()
    notebook(tmp_path / "nbs/table1.ipynb", GIVEN, (f"import os, time; open({str(tmp_path / 'kernel')!r}, 'w').write(str(os.getpid())); time.sleep(600)", []))
    command = [sys.executable, "-c", "from caf_nb.cli import report_app; report_app()", "--out", str(tmp_path / "out"), "--notebooks", str(tmp_path / "nbs")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    for _ in range(600):
        if (tmp_path / "kernel").is_file() and (tmp_path / "kernel").read_text(): break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    kernel = int((tmp_path / "kernel").read_text())
    for _ in range(150):
        if not Path(f"/proc/{kernel}").exists(): break
        time.sleep(0.2)
    assert not Path(f"/proc/{kernel}").exists()
    assert not (tmp_path / "out/notebooks/done.json").exists()


def test_a_run_on_published_data_looks_first(tmp_path, monkeypatch):
    "What is missing is listed before anything starts, with where to get it."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    run = CliRunner().invoke(report_app, ["--profile", "paper", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--notebooks", str(ROOT / "nbs")])
    assert run.exit_code == 1 and "Traceback" not in run.stderr
    assert all(words in run.stderr for words in ("things are missing", "M3FD", "MFNet", "DIDFuse"))
    assert "needs are missing" in run.stdout and not (tmp_path / "out").exists()


def wide_notebook(path: Path) -> Ran:
    "The widest table of the paper, all rows and all values there, with long sentences below it."
    profile = Profile.named("paper")
    def filled(n):
        table = paper_table(n)
        ours = {(d, m): dict.fromkeys(table[d], 88.8) for d in table.columns.unique("dataset") for m in table.index}
        return compare(n, ours, profile).assign(paper=77.7, delta=11.1)
    boxes, masks = filled(1), filled(2)
    tables = [*(show_table(boxes, d, profile.note) for d in boxes.dataset.unique()), show_table(filled(3)),
              *(show_table(masks, "mfnet", kind, [m for m in masks.metric.unique() if kind in m]) for kind in ("Acc", "IoU"))]
    wordy = pd.DataFrame({f"task network of the search {i}": ["segformer tiny from random (seed 0), 10 steps on embedded multispectral scenes", "/weights" * 40] for i in range(10)})
    tables.append(wordy.style)
    outputs = [{"output_type": "display_data", "metadata": {}, "data": {"text/html": t.to_html()}} for t in tables]
    notebook(path, ("", []))
    made = json.loads(path.read_text())
    made["cells"][0]["outputs"] = [*outputs, {"output_type": "stream", "name": "stdout", "text": "x" * 3000}]
    path.write_text(json.dumps(made))
    return Ran("table1", path, 1.)


def wide_cells(folder: Path) -> Path:
    "A cell with words that no line has room for."
    folder.mkdir()
    cell = {"stage": "u" * 300, "values": {"mAP@.5": 1.}, "provenance": {"fusion network": "caf with " + "/a-long-folder" * 40, "detector seconds": "5", "VGG of terms n, o": "random (seed 0)"},
            "configuration": {"a": {"b": "c" * 400}}, "environment": {"commit": "abc+", "torch": "2"}}
    (folder / "m3fd-caf-0.json").write_text(json.dumps(cell))
    return folder


@pytest.fixture
def page(tmp_path) -> Path:
    write_page(tmp_path / "index.html", Profile.named("paper"), [wide_notebook(tmp_path / "table1.ipynb")], {"table1": "Table 1: detection"}, wide_cells(tmp_path / "cells"))
    return tmp_path / "index.html"


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text()
    assert not re.findall(r"<(?:script|link|iframe)\b", text)
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)"', text))
    targets = re.findall(r'href="#([^"]+)"', text)
    assert targets and all(f'id="{target}"' in text for target in targets)
    assert all(words in text for words in ("VGG of terms n, o: random (seed 0)", "abc+", "all settings", "Δ"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser: chromium is not installed")
@pytest.mark.slow
def test_nothing_is_cut_off_at_1280_pixels(page, tmp_path):
    "No element is wider than the window, nor has contents that are wider than itself."
    check = """<script>onload = () => {const wide = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth || e.scrollWidth > Math.max(e.clientWidth, 1) + 1 && getComputedStyle(e).display != 'inline');
    document.title = 'WIDE ' + innerWidth + ' ' + document.documentElement.scrollWidth + ' ' + wide.map(e => e.tagName + '.' + e.className).join(' ')}</script>"""
    page.write_text(page.read_text().replace("</head>", check + "</head>").replace("<details", "<details open"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1280,1000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    said = re.search(r"<title>WIDE (\d+) (\d+) ?(.*?)</title>", shown)
    assert said and int(said[1]) == 1280 and int(said[2]) <= 1280 and not said[3], said


def test_what_is_kept_of_results():
    "Tables and cells are committed, what can be made again is not."
    def ignored(name): return subprocess.run(["git", "check-ignore", "-q", f"results/mini/{name}"], cwd=ROOT).returncode == 0
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    assert not any(ignored(name) for name in ("table1.csv", "table1.json", "claims.csv", "cells/m3fd-caf-0.json"))
    assert all(ignored(name) for name in ("index.html", "notebooks/table1.ipynb", "notebooks/done.json", "figure7.png", "pairs/m3fd/ir/1.png"))
