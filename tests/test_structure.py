"""The structure of the library, derived from its own imports: no cycle, and notebooks numbered in the order of imports."""

import ast
import json
import re
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS, ARROWS = 11, 115  # TODO 10, 90; # at most, with a package as one room


def module_of(path: Path) -> str:
    "`caf_nb/data/sets.py` is data.sets; the face of a package has the package's name."
    return ".".join(path.relative_to(ROOT / "caf_nb").with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {module_of(p): p for p in sorted((ROOT / "caf_nb").rglob("*.py")) if p.name != "_modidx.py" and p.parent.name + p.name != "caf_nb__init__.py"}


def imported(module: str) -> set[str]:
    "The modules of the library that a module imports, wherever the import stands, and those that it names for a late import."
    path, found = FILES[module], set()
    parents = ["caf_nb", *module.split(".")][: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            if full[:1] == ["caf_nb"]:
                for alias in node.names:
                    found |= {name for name in (".".join([*full[1:], alias.name]), ".".join(full[1:])) if name in FILES}
    return found - {module}


IMPORTS = {module: imported(module) for module in FILES}


def rooms() -> dict[str, set[str]]:
    "The same with each package as one room."
    found = defaultdict(set)
    for module, others in IMPORTS.items():
        found[module.partition(".")[0]] |= {other.partition(".")[0] for other in others} - {module.partition(".")[0]}
    return dict(found)


def notebooks() -> list[tuple[str, str]]:
    "Name and module of every library notebook, in the order of their numbers."
    found = []
    for path in sorted((ROOT / "nbs/lib").glob("*.ipynb")):
        text = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code")
        found.append((path.stem, re.search(r"#\|\s*default_exp\s+([\w.]+)", text)[1].removesuffix(".__init__")))
    return found


@pytest.mark.parametrize("graph", [IMPORTS, rooms()], ids=["modules", "rooms"])
def test_no_cycle(graph):
    list(TopologicalSorter(graph).static_order())  # raises CycleError, with the cycle


def test_floors_and_arrows():
    floor = {}
    for room in TopologicalSorter(rooms()).static_order():
        floor[room] = 1 + max((floor[below] for below in rooms()[room]), default=0)
    assert max(floor.values()) <= FLOORS, sorted(floor.items(), key=lambda f: f[1])
    assert sum(map(len, rooms().values())) <= ARROWS


def test_numbers_are_the_order_of_imports():
    names, place = notebooks(), {module: i for i, (_, module) in enumerate(notebooks())}
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name, _ in names), "a number of two digits without a letter"
    assert len({name[:2] for name, _ in names}) == len(names), "a number each"
    for name, module in names:
        above = [other for other in IMPORTS[module] if other in place and place[other] >= place[module]]
        assert not above, f"{name} imports {above}, which come later"


def test_every_module_has_its_notebook():
    assert {module for module in FILES if module.partition(".")[0] != "zoo"} == {module for _, module in notebooks()}


@pytest.mark.parametrize("path", sorted((ROOT / "caf_nb/zoo").glob("*.py")), ids=lambda p: p.stem)
def test_the_zoo_stands_on_little(path):
    "A method knows the layers below, the entry that it fills, and perhaps other methods; never who uses it."
    foreign = {name.partition(".")[0] for name in IMPORTS[module_of(path)]} - {"core", "data", "losses", "vgg", "checkpoints", "zoo"}
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
