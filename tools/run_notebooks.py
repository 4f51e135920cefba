"""Run library notebooks from top to bottom in place and keep their outputs, without what went to stderr.

Run from the root of the project: .venv/bin/python tools/run_notebooks.py [NOTEBOOK ...]; without names, all of nbs/lib and nbs/zoo, and the tour.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOT_RUN = {"notest", "cuda"}  # flags of nbdev that mark cells for other machines


def flags(cell) -> set[str]:
    "The directives at the top of a cell."
    return {line[2:].strip() for line in cell.source.splitlines() if line.startswith("#|")}


def run(path: Path) -> str: # "" if it ran through, else the error
    "Execute one notebook and write it back."
    notebook = nbformat.read(path, as_version=4)
    skipped = [cell for cell in notebook.cells if cell.cell_type == "code" and flags(cell) & NOT_RUN]
    for cell in skipped:
        cell.cell_type = "raw"
    try:
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    except CellExecutionError as error:
        return f"{path}: {error.ename}: {error.evalue}"
    for cell in skipped:
        cell.cell_type = "code"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    nbformat.write(notebook, path)
    return ""


if __name__ == "__main__":
    os.environ |= {"PYTHONPATH": str(Path.cwd()), "CAF_TEXT_BARS": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    paths = [Path(name) for name in sys.argv[1:]] or [*sorted(Path("nbs/lib").glob("*.ipynb")), *sorted(Path("nbs/zoo").glob("*.ipynb")), Path("nbs/index.ipynb")]
    with ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(run, paths) if error]
    subprocess.run(["nbdev_clean"], check=True)
    sys.exit("\n".join(errors) or None)
