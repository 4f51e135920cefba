"""The structure of the library, derived from its own imports: no cycle, and notebooks numbered in the order of imports."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from house import FILES, GOALS, cycles, floors, imported, measure, module_of, rooms  # noqa: E402

IMPORTS = {module: imported(module) for module in FILES if module}


def notebooks() -> list[tuple[str, str]]:
    "Name and module of every library notebook, in the order of their numbers."
    found = []
    for path in sorted((ROOT / "nbs/lib").glob("*.ipynb")):
        text = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code")
        found.append((path.stem, re.search(r"#\|\s*default_exp\s+([\w.]+)", text)[1].removesuffix(".__init__")))
    return found


@pytest.mark.parametrize("graph", [IMPORTS, rooms()], ids=["modules", "rooms"])
def test_no_cycle(graph):
    assert cycles(graph) == []


def test_goals():
    "What is reached stays reached: the goals of tools/house.py, and where a goal is still ahead, the limit here."
    limits = GOALS | {"lines": 15_550}
    assert {name: value for name, value in measure(types=False).items() if value > limits[name]} == {}


def test_a_cycle_is_seen():
    assert cycles({"a": {"b"}, "b": {"a"}}) and floors({"a": {"b"}, "b": set()}) == {"b": 1, "a": 2}


def test_numbers_are_the_order_of_imports():
    names, place = notebooks(), {module: i for i, (_, module) in enumerate(notebooks())}
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name, _ in names), "a number of two digits without a letter"
    assert len({name[:2] for name, _ in names}) == len(names), "a number each"
    for name, module in names:
        above = [other for other in IMPORTS[module] if other in place and place[other] >= place[module]]
        assert not above, f"{name} imports {above}, which come later"


def test_every_module_has_its_notebook():
    assert {module for module in FILES if module and module.partition(".")[0] != "zoo"} == {module for _, module in notebooks()}


@pytest.mark.parametrize("path", sorted((ROOT / "caf_nb/zoo").glob("*.py")), ids=lambda p: p.stem)
def test_the_zoo_stands_on_little(path):
    "A method knows the layers below, the entry that it fills, and perhaps other methods; never who uses it."
    foreign = {name.partition(".")[0] for name in IMPORTS[module_of(path)]} - {"core", "data", "losses", "checkpoints", "zoo"}
    assert not foreign, f"zoo/{path.name} imports {foreign}"


def test_paper_notebooks_are_thin():
    "Papermill notebooks hold parameters, calls and plots, and no library logic."
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if not any("parameters" in c["metadata"].get("tags", []) for c in cells):
            continue
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert not re.search(r"^\s*(def|class) ", code, re.MULTILINE), path
        assert not any(c.get("outputs") for c in cells), f"{path} is committed with outputs"


def test_outputs_are_quiet():
    "Committed outputs hold no stderr and no widgets, which show nothing without their kernel, and a notebook stays small enough to open."
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
        assert not [o for o in outputs if o.get("name") == "stderr" or o.get("output_type") == "error" or "application/vnd.jupyter.widget-view+json" in o.get("data", ())], path
        assert path.stat().st_size < 1_200_000, path
