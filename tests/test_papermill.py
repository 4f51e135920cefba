"""The paper notebooks as their users run them: tables and the figures that stand on them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from caf_nb.config import Profile
from caf_nb.core import CafError
from caf_nb.data import luma, read_image
from caf_nb.report import cache_folder
from caf_nb.rows import Cell, Setup
from cells import run_cells

ROOT = Path(__file__).resolve().parents[1]


def papermill(name: str, out: Path, **parameters: str) -> subprocess.CompletedProcess:
    "Run one in profile smoke. Notebooks with one `out` share their stages, as in a report."
    command = [sys.executable, "-m", "papermill", f"nbs/{name}.ipynb", str(out.parent / f"{name}.ipynb"), "-k", "python3", "-p", "out", str(out)]
    return subprocess.run([*command, *(word for item in parameters.items() for word in ("-p", *item))], cwd=ROOT, capture_output=True, text=True)


def shown(name: str, out: Path) -> str:
    return json.dumps(json.loads((out.parent / f"{name}.ipynb").read_text())["cells"])


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("report") / "smoke"


@pytest.mark.slow
def test_table1(out):
    done = papermill("table1", out, methods="vi,caf")
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(out / "table1.csv")
    ours = table[table.ours.notna()]
    assert set(zip(ours.dataset, ours.method)) == {(d, m) for d in ("m3fd", "multispectral") for m in ("vi", "caf")}
    summary = ours[ours.metric.isin(["mAP@.5:.95", "mAP@.5"])]
    assert len(summary) == 8 and summary.ours.between(0, 100).all()
    assert (summary[summary.metric == "mAP@.5"].ours >= 30).all()  # a first look shows something
    assert set(table.verdict) == {"not run"}  # synthetic scenes say nothing about the paper's claims
    page = shown("table1", out)
    assert "a first look" in page and "Printed: **supported** (CAF 69.6, TarDAL 67.9). Ours: **" in page
    provenance = json.loads((out / "table1.json").read_text())
    assert all("yolov5n.safetensors of the package" in row["detector"] for row in provenance["stages"])
    cell = Cell.model_validate_json((out / "cells/m3fd-caf-0.json").read_text())
    assert cell.scores["mAP@.5"] == pytest.approx(ours[(ours.dataset == "m3fd") & (ours.method == "caf") & (ours.metric == "mAP@.5")].ours.item())
    assert cell.environment["torch"] and cell.configuration["fused"]["model"]["loss"]["kind"] == "searched"


@pytest.mark.slow
def test_no_fused_image_is_darker_than_both_sources(out):
    "Rests on the table before, which fused the images."
    smoke = Profile.named("smoke")
    setup = Setup(profile=smoke, trained=smoke.trained, cache=str(cache_folder(str(out))))
    images = setup.score("m3fd", "caf").fused.run() / "images/test"
    for scene in setup.data("m3fd").whole("test"):
        fused = luma(read_image(images / f"{scene.stem}.png")).mean()
        assert fused >= min(scene.ir.mean(), luma(scene.vi).mean()), scene.stem


@pytest.mark.slow
def test_table2(out):
    run_cells("table2", out=str(out), methods="vi,caf")
    table = pd.read_csv(out / "table2.csv")
    ours = table[table.ours.notna() & table.metric.isin(["mAcc", "mIoU"])]
    assert set(zip(ours.method, ours.metric)) == {(m, metric) for m in ("vi", "caf") for metric in ("mAcc", "mIoU")} and ours.ours.between(0, 100).all()
    assert (ours[ours.metric == "mIoU"].ours >= 25).all()
    assert table[(table.method == "u2fusion") & (table.metric == "mIoU")].paper.item() == 45.2


@pytest.mark.long
@pytest.mark.slow
def test_table3(out):
    "A network with its own loss and with a searched one, CAF with given weights; what the tables before have made is not made again."
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*-caf-0.json")}
    done = papermill("table3", out, methods="reconet,reconet_p,caf_a,caf")
    assert done.returncode == 0, done.stderr[-2000:]
    ours = pd.read_csv(out / "table3.csv").query("ours.notna()")
    assert set(ours.method) == {"reconet", "reconet_p", "caf_a", "caf"} and {"MI", "VIF", "People", "Car", "mIoU"} <= set(ours.metric) and not ours.metric.str.startswith("Acc").any()
    cells = [Cell.model_validate_json(p.read_text()).scores for p in (out / "cells").glob("m[3f]*.json")]
    assert min(c["mAP@.5"] for c in cells if "mAP@.5" in c) >= 30 and min(c["mIoU"] for c in cells if "mIoU" in c) >= 25
    assert (ours[ours.metric == "MI"].ours > 0).all() and ours[ours.metric == "MI"].ours.nunique() == 4
    page = shown("table3", out)
    assert "Printed: **supported** (15 of 15). Ours: **" in page and "MI: UMFusion_p 1.242, UMFusion 1.263; VIF: ReCoNet_p 0.955, ReCoNet 0.978" in page
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_figure6(out):
    "Without weights only the sources, the network of the tables and the methods that are trained here are shown; who is not is said."
    said = " ".join(run_cells("figure6", out=str(out))["shown"].left_out.values())
    origin = pd.read_csv(out / "figure6.csv", index_col="method")["fusion network"]
    assert list(origin.index) == ["ir", "vi", "reconet", "caf"] and origin["caf"].startswith("caf from caf.safetensors of the package, ")
    assert origin["reconet"] == "reconet from random (seed 0), 16 steps on synthetic m3fd"
    for name in ("DIDFuse", "SDNet", "UMFusion", "DeFusion", "U2Fusion", "TarDAL"):
        assert f"{name} is left out: there are no weights of it" in said
    assert len(list(out.glob("figure6_synthetic_*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name, title", [("figure2", "yolov5n from yolov5n.safetensors of the package"), pytest.param("figure3", "segformer tiny from segformer-tiny of the package", marks=pytest.mark.long)])
def test_figures_of_the_tables(out, name, title):
    run_cells(name, out=str(out), methods="vi,caf")
    pictures = sorted(out.glob(f"{name}_*.png"))
    assert len(pictures) == 2 and all(read_image(p).shape[0] in (3, 4) for p in pictures)
    origin = pd.read_csv(out / f"{name}.csv", index_col="method")
    assert list(origin.index) == ["Visible", "CAF"] and origin.filter(regex="^(detector|segmenter)$").iloc[:, 0].str.startswith(title).all()


@pytest.mark.parametrize("name, parameters, cause", [("table2", {"profile": "huge"}, "there is no profile 'huge'"),
                                                     ("figure2", {"methods": "ir,magic"}, "there is no row 'magic'"),
                                                     ("figure6", {"methods": "ir,magic"}, "there is no row 'magic'"),
                                                     ("figure6", {"data_root": "nbs"}, "holds no folder with ir/ and vi/")])
def test_bad_parameters(tmp_path, name, parameters, cause):
    with pytest.raises(CafError, match=re.escape(cause)):
        run_cells(name, out=str(tmp_path / "smoke"), **parameters)


@pytest.mark.long
def test_bad_parameters_end_papermill(tmp_path):
    done = papermill("table1", tmp_path / "smoke", profile="paper")
    assert done.returncode == 1 and "vgg16-397923af.pth" in done.stderr
