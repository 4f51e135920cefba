"""The report as its users run it: what is run, what is not run again, and the page."""

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from caf_nb.cli import report_app
from caf_nb.config import Profile
from caf_nb.report import build_report, compare, paper_table, show_table
from caf_nb.report.page import _accepted, run_notebook

ROOT = Path(__file__).resolve().parents[1]
GIVEN = ("profile = 'mini'; out = ''", ["parameters"])


def notebook(path: Path, *cells: tuple[str, list[str]]) -> Path:
    "A notebook with a title and cells of code."
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": tags}, "source": source, "outputs": [], "execution_count": None} for i, (source, tags) in enumerate(cells)]
    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# About {path.stem}"}
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    path.write_text(json.dumps({"cells": [title, *made], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def project(root: Path) -> Path:
    "A folder of notebooks beside the configuration of the page."
    (root / "docs").symlink_to(ROOT / "docs")
    return root / "nbs"


def page_of(out: Path, name: str) -> str:
    "The text of a page."
    return re.sub(r"<[^>]+>", "", (out / f"page/html/{name}.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_what_has_not_changed_is_not_run_again(tmp_path):
    "One notebook works, one fails: both are on the page, and the second time only the failing one runs."
    nbs, out = project(tmp_path), tmp_path / "out"
    notebook(nbs / "figure9.ipynb", GIVEN, ("print('running in', profile)", []))
    notebook(nbs / "table1.ipynb", GIVEN, ("raise ValueError('size of `vi`')", []))
    page, ran = build_report("smoke", out, nbs)
    assert page == out / "index.html" and "page/html/index.html" in page.read_text()
    assert list(ran) == ["table1", "figure9"] and ran["table1"].error == "ValueError: size of `vi`" and not ran["figure9"].error
    assert "running in smoke" in page_of(out, "figure9") and "This notebook stopped" in page_of(out, "table1")
    assert all(words in page_of(out, "index") for words in ("About table1", "stopped", "ValueError: size of `vi`", "About figure9", "profile smoke"))
    _, ran = build_report("smoke", out, nbs)
    assert ran["table1"].error and not ran["table1"].reused and ran["figure9"].reused and "unchanged since" in page_of(out, "index")


@pytest.mark.slow
@pytest.mark.long
def test_all_of_it_again(tmp_path):
    nbs, out = project(tmp_path), tmp_path / "out"
    notebook(nbs / "table1.ipynb", GIVEN, ("print('running in', profile)", []))
    for fresh in (False, True):
        _, ran = build_report("smoke", out, nbs, fresh=fresh)
        assert not ran["table1"].error and not ran["table1"].reused


@pytest.mark.slow
def test_a_kernel_that_dies_is_told(tmp_path):
    heard = []
    path = notebook(tmp_path / "a.ipynb", GIVEN, ("import sys; print('almost', file=sys.stderr, flush=True)", []), ("import os; os._exit(3)", []))
    why = asyncio.run(run_notebook(path, tmp_path / "ran.ipynb", {"profile": "smoke"}, 1, heard.append))
    assert "died" in why.lower() and "almost" in heard


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, *(pytest.param(how, marks=pytest.mark.long) for how in (signal.SIGTERM, signal.SIGKILL))])
def test_an_interrupted_report_stops_its_notebooks(tmp_path, how):
    "After a signal to the report alone, no process of it is left, kernels included."
    notebook(tmp_path / "nbs/table1.ipynb", GIVEN, (f"import os, time; open({str(tmp_path / 'kernel')!r}, 'w').write(str(os.getpid())); time.sleep(600)", []))
    command = [sys.executable, "-c", "from caf_nb.cli import report_app; report_app()", "--out", str(tmp_path / "out"), "--notebooks", str(tmp_path / "nbs")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    for _ in range(600):
        if (tmp_path / "kernel").is_file() and (tmp_path / "kernel").read_text(): break
        time.sleep(0.2)
    process.send_signal(how)
    assert process.wait(60) != 0
    kernel = int((tmp_path / "kernel").read_text())
    for _ in range(150):
        if not Path(f"/proc/{kernel}").exists(): break
        time.sleep(0.2)
    assert not Path(f"/proc/{kernel}").exists()
    if how != signal.SIGKILL: assert json.loads((tmp_path / "out/notebooks/done.json").read_text()) == {}
    assert not (tmp_path / "out/index.html").exists()


@pytest.mark.slow
@pytest.mark.long
def test_two_reports_in_one_folder(tmp_path):
    "The second waits, and runs nothing again."
    notebook(tmp_path / "nbs/table1.ipynb", GIVEN, (f"import os, time; open({str(tmp_path / 'ran')!r}, 'a').write('x'); time.sleep(3)", []))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    command = [sys.executable, "-c", "from caf_nb.cli import report_app; report_app()", "--out", str(tmp_path / "out"), "--notebooks", str(tmp_path / "nbs")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "ran").read_text() == "x" and sorted("1 of them before" in out for out, _ in said) == [False, True]


def test_a_run_on_published_data_looks_first(tmp_path, monkeypatch):
    "What is missing is listed before anything starts, with where to get it."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    run = CliRunner().invoke(report_app, ["--profile", "paper", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--notebooks", str(ROOT / "nbs")])
    assert run.exit_code == 1 and "Traceback" not in run.stderr
    assert all(words in run.stderr for words in ("things are missing", "M3FD", "MFNet")) and "DIDFuse" not in run.stderr
    assert "needs are missing" in run.stdout and "Rows that stay empty: DIDFuse" in run.stdout and not (tmp_path / "out").exists()


def test_a_notebook_gets_the_parameters_that_it_has():
    "Since notebooks refuse others; every paper notebook takes part in every run."
    given = dict.fromkeys(("profile", "workers", "data_root", "without"), "x")
    known = {name: set(_accepted(ROOT / f"nbs/{name}.ipynb", given)) for name in ("table1", "claims", "figure1")}
    assert known == {"table1": given.keys() - {"workers"}, "claims": given.keys(), "figure1": {"profile"}}


def wide_tables() -> str:
    "The widest tables of the paper, all rows and all values there, and words that no line has room for."
    profile = Profile.named("paper")
    def filled(n):
        table = paper_table(n)
        ours = {(d, m): dict.fromkeys(table[d], 88.8) for d in table.columns.unique("dataset") for m in table.index}
        return compare(n, ours, profile).assign(paper=77.7, delta=11.1)
    boxes, masks = filled(1), filled(2)
    tables = [*(show_table(boxes, d, profile.note) for d in boxes.dataset.unique()), show_table(filled(3)),
              *(show_table(masks, "mfnet", kind, [m for m in masks.metric.unique() if kind in m]) for kind in ("Acc", "IoU"))]
    return "".join(t.to_html() for t in tables)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    "The report of one notebook with wide tables and a provenance."
    root = tmp_path_factory.mktemp("wide")
    (root / "wide.html").write_text(wide_tables(), encoding="utf-8")
    wordy = "{f'task network of the search {i}': ['segformer tiny from random (seed 0), 10 steps on synthetic scenes', '/weights' * 40] for i in range(10)}"
    notebook(project(root) / "table1.ipynb", GIVEN, (f"from IPython.display import HTML; HTML(open({str(root / 'wide.html')!r}).read())", []), ("print('x' * 3000)", []),
             (f"import pandas as pd; pd.DataFrame({wordy}).style", ["hide-output"]))
    build_report("smoke", root / "out", root / "nbs")
    return root / "out"


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(out):
    "Whatever a browser loads is in the folder; links to other places may be there."
    for file in (out / "page/html").glob("*.html"):
        text = file.read_text(encoding="utf-8")
        loaded = [*re.findall(r'\bsrc="([^"]*)"', text), *re.findall(r'<link\b[^>]*\bhref="([^"]*)"', text)]
        assert loaded and all((file.parent / source.partition("?")[0]).is_file() for source in loaded if not source.startswith(("data:", "#"))), file


@pytest.mark.slow
def test_code_is_hidden_and_provenance_folds(out):
    text = (out / "page/html/table1.html").read_text(encoding="utf-8")
    assert "88.8" in text and "import pandas" not in page_of(out, "table1")
    assert "segformer tiny from random" in text.partition("<details")[2].partition("</details>")[0]


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb") if '"parameters"' in p.read_text(encoding="utf-8")))
def test_provenance_of_the_paper_notebooks_folds(name):
    cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    start = next(i for i, c in enumerate(cells) if "".join(c["source"]).startswith("## Where the "))
    assert [c["metadata"].get("tags") for c in cells[start:]] == [None, *[["hide-output"]] * (len(cells) - start - 1)]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser: chromium is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off(out, tmp_path, width):
    "The page is not wider than the window. In a wide one no table is cut off; in a narrow one wide tables scroll."
    check = """<script>onload = () => {const wide = [...document.querySelectorAll('.cell_output')].filter(e => e.scrollWidth > e.clientWidth + 1);
    document.title = 'WIDE ' + innerWidth + ' ' + document.documentElement.scrollWidth + ' ' + wide.length}</script>"""
    shutil.copytree(out / "page/html", tmp_path / "html")
    file = tmp_path / "html/table1.html"
    file.write_text(file.read_text(encoding="utf-8").replace("</head>", check + "</head>").replace("<details", "<details open"), encoding="utf-8")
    frame = tmp_path / "html/frame.html"  # a browser's window is 500 pixels wide at least, a frame is not
    frame.write_text(f'<iframe src="table1.html" style="width: {width}px; height: 1000px; border: 0" onload="setTimeout(() => document.title = this.contentDocument.title, 500)"></iframe>')
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    said = re.search(r"<title>WIDE (\d+) (\d+) (\d+)</title>", shown)
    assert said and int(said[1]) == width and int(said[2]) <= width and (width < 1280 or int(said[3]) == 0), said or shown[:500]



def test_what_is_kept_of_results():
    "Tables, cells and executed notebooks are committed, what can be made again is not."
    def ignored(name): return subprocess.run(["git", "check-ignore", "-q", f"results/mini/{name}"], cwd=ROOT).returncode == 0
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    assert not any(ignored(name) for name in ("table1.csv", "table1.json", "claims.csv", "cells/m3fd-caf-0.json", "notebooks/table1.ipynb"))
    assert all(ignored(name) for name in ("index.html", "notebooks/done.json", "figure7.png", "pairs/m3fd/ir/1.png"))
