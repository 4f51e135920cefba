"""The site: what Sphinx is given can be shown. `make docs` builds it, with warnings as errors."""

import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from latex2mathml.converter import convert

from caf_nb.config import FusionSettings
from caf_nb.fusion import fuse_folder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from docments import rewritten, without  # noqa: E402

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
    lines = inspect.getdoc(obj).splitlines()
    conf["docments"](None, what, "", obj, None, lines)
    assert any(line.startswith(f":{name}: ") and text in line for line in lines), lines


def test_help_shows_the_comments_behind_parameters():
    "Also of those above a line, of what is returned, and of fields; nothing but docstrings changes, and nothing twice."
    source = """# %% a cell
def double(x: int, # any number
           # one line
           y: int = 2,
           z: int = 3, # of `a`\\b
) -> int: # twice
    "Double."
    return 2 * x

class Size(NamedTuple):
    "A size."
    w: int # in pixels
    h: int
"""
    new, found = rewritten(source), {}
    exec("from typing import NamedTuple\n" + new, found)
    assert inspect.getdoc(found["double"]) == "Double.\n\nArgs:\n    x: any number\n    y: one line\n    z: of `a`\\b\nReturns:\n    twice"
    assert inspect.getdoc(found["Size"]) == "A size.\n\nFields:\n    w: in pixels"
    assert rewritten(new) == new and without(new) == source
    assert "\n    color: put the chroma of `vi` back" in inspect.getdoc(fuse_folder)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_and_formulas(path):
    "A link leads to a file, and a formula can be written as MathML."
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", prose(path)):
        assert (path.parent / target).is_file(), target
    for block, inline in re.findall(r"\$\$(.+?)\$\$|(?<!\$)\$([^$\n]+?)\$(?!\$)", prose(path), re.DOTALL):
        assert convert(block or inline).startswith("<math")
