"""The paper notebooks as their users run them."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]


def papermill(out: Path, *parameters: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", "nbs/table1.ipynb", str(out / "table1.ipynb"), "-k", "python3", "-p", "out", str(out / "smoke")]
    return subprocess.run([*command, *parameters], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_table1(tmp_path):
    done = papermill(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(tmp_path / "smoke/table1.csv")
    ours = table[table.ours.notna()]
    assert set(zip(ours.dataset, ours.method)) == {(d, m) for d in ("m3fd", "multispectral") for m in ("ir", "vi", "caf")}
    summary = ours[ours.metric.isin(["mAP@.5:.95", "mAP@.5"])]
    assert len(summary) == 12 and summary.ours.between(0, 100).all()
    assert set(table.verdict) == {"not run"}  # embedded scenes say nothing about the paper's claims
    text = json.dumps(json.loads((tmp_path / "table1.ipynb").read_text())["cells"])
    assert "wiring only" in text
    provenance = json.loads((tmp_path / "smoke/table1.json").read_text())
    assert all("random (seed 0)" in row["detector"] for row in provenance["stages"])


@pytest.mark.parametrize("parameters, cause", [(("-p", "profile", "huge"), "there is no profile 'huge'"),
                                               (("-p", "methods", "ir,magic"), "there is no method 'magic'"),
                                               (("-p", "profile", "paper"), "things are missing")])
def test_bad_parameters(tmp_path, parameters, cause):
    done = papermill(tmp_path, *parameters)
    assert done.returncode == 1 and cause in done.stderr
