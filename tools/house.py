"""Count the structure of the library: floors, arrows, cycles, lines, cells, names that nobody uses, and (with --types) mypy's errors.

Run from the root of the project: .venv/bin/python tools/house.py [--types]
Exit code 1 where a goal is missed. `tests/test_structure.py` reads the same imports.
"""

import ast
import json
import re
import statistics
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "caf_nb"
GOALS = {"floors": 10, "arrows": 90, "cycles": 0, "lines": 8500, "lines over 120 characters": 50, "export cells, median": 12,
         "export cells, 90th percentile": 28, "unused exports": 0, "mypy errors": 0}


def module_of(path: Path) -> str:
    "`caf_nb/data/sets.py` is data.sets; the face of a package has the package's name; the package itself is ''."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {module_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"}


def imported(module: str) -> set[str]:
    "The modules of the library that a module imports, wherever in it the import stands."
    path, found = FILES[module], set()
    parents = ["caf_nb", *module.split(".")][: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            if full[:1] == ["caf_nb"]:
                for alias in node.names:
                    names = (".".join([*full[1:], alias.name]), ".".join(full[1:]))
                    found |= {next((name for name in names if name in FILES), module)}
    return found - {module, ""}


def rooms() -> dict[str, set[str]]:
    "The same with each package as one room."
    found: dict[str, set[str]] = {}
    for module in filter(None, FILES):
        room = module.partition(".")[0]
        found.setdefault(room, set()).update({other.partition(".")[0] for other in imported(module)} - {room})
    return found


def cycles(graph: dict[str, set[str]]) -> list[str]:
    "The first cycle of a graph, if there is one."
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    "Every room stands one floor above the highest that it imports."
    found: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        found[room] = 1 + max((found[below] for below in graph[room]), default=0)
    return found


def code_cells() -> list[tuple[Path, str]]:
    "Every code cell of the notebooks in git."
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            found += [(path, "".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    return found


def export_sizes() -> list[int]:
    "Lines of every export cell, without blank ones and directives."
    cells = [text for _, text in code_cells() if text.lstrip().startswith("#| export")]
    return [sum(bool(line.strip()) and not line.startswith("#|") for line in text.splitlines()) for text in cells]


def annotations(tree: ast.Module) -> list[ast.expr]:
    "The types in the signatures and fields of public functions and classes, which a reader of these meets."
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    nodes = [node for top in public for node in ast.walk(top)]
    found = [node.returns for node in nodes if isinstance(node, ast.FunctionDef)]
    return [x for x in found + [node.annotation for node in nodes if isinstance(node, (ast.arg, ast.AnnAssign))] if x is not None]


def unused() -> list[str]:
    "Exported names that stand nowhere but in the notebook that defines them: no other notebook, test, tool or page, no public signature."
    texts = {path: "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]) for path, _ in code_cells()}
    others = [p.read_text(encoding="utf-8") for folder in ("tests", "tools", "docs") for p in (ROOT / folder).rglob("*.*") if p.suffix in (".py", ".md")]
    others += [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml", "Makefile")]
    found = []
    for module, path in FILES.items():
        source = path.read_text(encoding="utf-8")
        names = re.search(r"^__all__ = \[(.*?)\]", source, re.S | re.M)
        home = re.search(r"File to edit: \S*?nbs/(\S+?)\.$", source, re.M)
        if not names or not home or path.name == "__init__.py" and module not in ("zoo",):
            continue
        faces = {ROOT / "nbs/lib" / p.name for p in (ROOT / "nbs/lib").glob("*.ipynb") if "_all_ = [" in p.read_text(encoding="utf-8")}
        signatures = " ".join(ast.unparse(part) for part in annotations(ast.parse(source)))
        for name in re.findall(r"'(\w+)'", names[1]):
            word = re.compile(rf"\b{name}\b")
            if word.search(signatures):
                continue
            places = [text for where, text in texts.items() if where != ROOT / "nbs" / home[1] and where not in faces] + others
            if not any(word.search(text) for text in places):
                found.append(f"{module}.{name}")
    return found


def mypy_errors() -> int:
    "How many errors mypy finds in the package."
    done = subprocess.run([sys.executable, "-m", "mypy", "caf_nb"], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"Found (\d+) errors?", done.stdout)
    return int(found[1]) if found else 0 if "Success" in done.stdout else -1


def measure(types: bool) -> dict[str, float]:
    "All counts."
    graph, lines, sizes = rooms(), [line for p in FILES.values() for line in p.read_text(encoding="utf-8").splitlines()], sorted(export_sizes())
    loops = cycles({module: imported(module) for module in FILES}) or cycles(graph)
    found = {"floors": 0 if loops else max(floors(graph).values()), "arrows": sum(map(len, graph.values())), "cycles": len(loops), "lines": len(lines),
             "lines over 120 characters": sum(len(line) > 120 for line in lines), "export cells, median": statistics.median(sizes),
             "export cells, 90th percentile": sizes[int(0.9 * len(sizes))], "unused exports": len(unused())}
    return found | ({"mypy errors": mypy_errors()} if types else {})


if __name__ == "__main__":
    found = measure("--types" in sys.argv)
    for name, value in found.items():
        print(f"{name:32} {value:>7g}   goal {GOALS[name]}")
    if "--names" in sys.argv:
        print("\n".join(unused()))
    sys.exit(any(value > GOALS[name] or value < 0 for name, value in found.items()))
