"""The site: what Sphinx is given can be shown. `make docs` builds it, with warnings as errors."""

import json
import re
import runpy
from pathlib import Path

import pytest
from latex2mathml.converter import convert

from caf_nb.config import FusionSettings
from caf_nb.fusion import fuse_folder

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


class Tags:
    "What Sphinx defines for a configuration."

    def has(self, name): return False


def prose(path: Path) -> str:
    "The text cells of a notebook, without code."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return re.sub(r"```.*?```|`[^`\n]*`", "", "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def conf() -> dict:
    return runpy.run_path(str(ROOT / "docs/conf.py"), {"tags": Tags()})


@pytest.mark.parametrize("obj, what, name, text", [(fuse_folder, "function", "param color", "put the chroma of"), (FusionSettings, "class", "param lr", "Adam")])
def test_comments_behind_parameters_are_shown(conf, obj, what, name, text):
    lines = ["A sentence."]
    conf["docments"](None, what, "", obj, None, lines)
    assert any(line.startswith(f":{name}: ") and text in line for line in lines), lines


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_and_formulas(path):
    "A link leads to a file, and a formula can be written as MathML."
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", prose(path)):
        assert (path.parent / target).is_file(), target
    for block, inline in re.findall(r"\$\$(.+?)\$\$|(?<!\$)\$([^$\n]+?)\$(?!\$)", prose(path), re.DOTALL):
        assert convert(block or inline).startswith("<math")
