"""The layer diagram: a notebook imports only from notebooks before it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [p.stem.split("_", 1)[1] for p in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]


@pytest.mark.parametrize("module", LAYERS)
def test_imports_go_downwards(module):
    source = (ROOT / f"caf_nb/{module}.py").read_text(encoding="utf-8")
    imported = re.findall(r"^\s*from (?:caf_nb)?\.(\w+) import", source, re.MULTILINE)
    above = [name for name in imported if name in LAYERS and LAYERS.index(name) >= LAYERS.index(module)]
    assert not above, f"{module} imports upwards: {above}"


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
