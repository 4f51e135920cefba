"""The README's snippet runs, and what it names exists."""

import re
from pathlib import Path

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


def test_length():
    assert len(README.splitlines()) <= 120
