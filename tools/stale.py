"""Exit 1 unless the modules in caf_nb/ are exactly those that some notebook exports.

`nbdev_export` leaves the module of a renamed or deleted notebook behind, and `git status` does not show it.
"""

import json
import re
import sys
from pathlib import Path

KEPT = {"__init__.py", "_modidx.py"}


def exported(notebook: Path) -> str | None:
    "The module that `notebook` exports to, as a path under caf_nb/."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    found = re.search(r"^#\|\s*default_exp\s+([\w.]+)", source, re.MULTILINE)
    return found and found[1].replace(".", "/") + ".py"


notebooks = [p for p in Path("nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
want = {m for m in map(exported, notebooks) if m}
have = {p.relative_to("caf_nb").as_posix() for p in Path("caf_nb").rglob("*.py") } - KEPT
for module in sorted(want - have):
    print(f"caf_nb/{module} is missing; run nbdev_export")
for module in sorted(have - want):
    print(f"caf_nb/{module} is stale: no notebook exports it; delete it")
sys.exit(want != have)
