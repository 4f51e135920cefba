"""The README's snippet runs, and what it names exists."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest

from caf_nb.report.study import seeds_needed, what_is_excluded

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_snippet(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_links(target):
    assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


def test_results():
    "The numbers of the section Results are those of results/mini, and every claim that it calls decided is."
    found = pd.read_csv(ROOT / "results/mini/claims.csv").set_index(["claim", "against", "metric"])
    section = README.split("## Results")[1].split("\n## ")[0]
    for key in (("C1", "caf_a", "mAP@.5"), ("C1", "caf_r", "mAP@.5"), ("C1", "caf_h", "mAP@.5"), ("C6", "caf_joint", "mIoU")):
        row = found.loc[key]
        assert f"{row.effect:+.1f} [{row.low:+.1f}, {row.high:+.1f}]" in section
    gaps, seeds = what_is_excluded(found.reset_index()).loc["C2"], seeds_needed(found.reset_index())
    assert set(gaps["paper's gap excluded"]) == {"yes"} and f"{gaps.printed.min():.1f} to {gaps.printed.max():.1f} points of mIoU; at most {gaps.high.max():.1f} here" in section
    assert f"one point would take {seeds.loc['mAP@.5, rows of CAF', 'seeds for 1']:.0f} seeds to see" in section
    assert set(found.loc["C1"].verdict) == {"undecided"} and list(found.loc["C4"].verdict).count("supported") == 3


def test_decisions_in_results():
    "What the section Results says of profile frozen is what results/frozen holds."
    section, folder = README.split("## Results")[1].split("\n## ")[0], ROOT / "results/frozen"
    claims, controls = (pd.read_csv(folder / f"{name}.csv").set_index(["claim", "against", "metric"]) for name in ("claims", "controls"))
    for table, key in ((claims, ("C1", "caf_a", "mAP@.5:.95")), (claims, ("C2", "caf_a", "mIoU")), (controls, ("Warm-up", "caf_a", "mIoU")), (controls, ("Adam's step", "caf_a", "mAP@.5:.95")),
                       (controls, ("Weights of pixels", "caf_warm", "mIoU")), (controls, ("Labels", "caf_unlabelled", "mIoU"))):
        row = table.loc[key]
        assert f"{row.effect:+.1f} [{row.low:+.1f}, {row.high:+.1f}]" in section
    gates = pd.read_csv(folder / "gates.csv").set_index("task")
    for column, text in (("between halves of the seeds", "{:.2f} for detection, {:.2f} for segmentation"), ("one step: with the effects", "({:.2f}, {:.2f})")):
        assert text.format(*gates[column][["detection", "segmentation"]]) in section
    assert "that of detection does ({:.2f})".format(gates.loc["detection", "Adam's step: with the effects"]) in section
    for room in pd.DataFrame(json.loads((folder / "gates.json").read_text(encoding="utf-8"))["head-room"]).itertuples():
        assert f"{room[4]:+.1f} [{room.low:+.1f}, {room.high:+.1f}]" in section
    warm = controls.loc["Warm-up"].verdict
    assert (warm["caf_a", "mIoU"], warm["caf_a", "mAP@.5:.95"]) == ("supported", "undecided") and {*claims.loc[["C1", "C2"]].verdict} == {"undecided"}


def test_length():
    assert len(README.splitlines()) <= 120


def test_the_badge_opens_the_tour():
    "It names the repository of settings.ini; the tour installs from there in Colab, and nothing anywhere else."
    settings = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE))
    repository = settings["git_url"].removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{repository}/blob/{settings['branch']}/nbs/index.ipynb" in README
    cells = ["".join(cell["source"]) for cell in json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    commands = []
    for modules in ({}, {"google.colab": object()}):
        with patch.dict(sys.modules, modules), patch("subprocess.run", lambda words, check: commands.append(words)): exec(cells[0], {})
    assert [words[-1] for words in commands] == [f"caf_nb[all] @ git+{settings['git_url']}"]
