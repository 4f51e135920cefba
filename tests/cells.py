"""The code of a paper notebook, run in this process: what stops it is raised, and nothing is imported twice."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_cells(name: str, **parameters: object) -> dict[str, object]:
    "Run the code cells one after the other, with `parameters` set after the cell that is tagged so, as papermill does; what they named."
    names: dict[str, object] = {}
    for cell in json.loads((ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", ()) else {}
    return names
