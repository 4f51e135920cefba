"""The layer diagram: a module imports only from modules before it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["core", "data", "datasets", "archives", "synth", "losses", "checkpoints", "zoo", "fusion", "tasks", "deeplab", "anchors", "search", "textbook", "differences", "loop",
          "fusion_training", "detector_training", "segmenter_training", "train",
          "joint", "metrics", "inputs", "stages", "gallery", "preflight", "tables", "study", "report", "pictures", "page", "cli", "cli_data"]
NUMBERED = [p.stem.split("_", 1)[1] for p in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))]
ZOO = {"core", "data", "losses", "checkpoints"}  # what a method may know of the library


def imported(path: Path) -> set[str]:
    "The modules of the library that a file imports."
    source = path.read_text(encoding="utf-8")
    return set(re.findall(r"^\s*from (?:caf_nb\.|\.+)(\w+)(?:\.\w+)* import", source, re.MULTILINE))


def test_every_notebook_has_its_layer():
    assert not set(NUMBERED) - set(LAYERS), "name the new module in LAYERS, where it belongs"


@pytest.mark.parametrize("module", NUMBERED)
def test_imports_go_downwards(module):
    above = [name for name in imported(ROOT / f"caf_nb/{module}.py") if name in LAYERS and LAYERS.index(name) >= LAYERS.index(module)]
    assert not above, f"{module} imports upwards: {above}"


@pytest.mark.parametrize("path", sorted((ROOT / "caf_nb/zoo").glob("*.py")), ids=lambda p: p.stem)
def test_the_zoo_stands_on_little(path):
    "A method knows the layers below, the entry that it fills, and perhaps other methods; never who uses it."
    foreign = {name for name in imported(path) if name in LAYERS} - ZOO - {"zoo"}
    assert not foreign, f"zoo/{path.name} imports {foreign}"


def test_paper_notebooks_are_thin():
    "Papermill notebooks hold parameters, calls and plots, and no library logic."
    import json
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if not any("parameters" in c["metadata"].get("tags", []) for c in cells):
            continue
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert not re.search(r"^\s*(def|class) ", code, re.MULTILINE), path
        assert not any(c.get("outputs") for c in cells), f"{path} is committed with outputs"
