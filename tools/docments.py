"""Write what stands behind parameters and fields into the docstrings of the exported modules, where `help()`, Shift-Tab and editors look for it.

`tools/stale.py` does it after every export. The notebooks keep the comments; what is derived here is never edited.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

HEADS = ("Args:", "Fields:", "Returns:")
Definition = ast.FunctionDef | ast.ClassDef


def comments(source: str) -> tuple[dict[int, str], set[int]]:
    "The comment of each line, and the lines that hold nothing else."
    found = {t.start[0]: t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    found = {n: t for n, t in found.items() if not t.string.startswith(("# %%", "# type:"))}
    return {n: t.string.lstrip("# ").partition("# type:")[0].strip() for n, t in found.items()}, {n for n, t in found.items() if not t.line[: t.start[1]].strip()}


def public(body: list[ast.stmt], inside: bool = False) -> Iterator[Definition]:
    "Public functions and classes, and the public methods of these."
    for node in body:
        if isinstance(node, Definition) and (not node.name.startswith("_") or inside and node.name == "__call__"):
            yield node
            if isinstance(node, ast.ClassDef): yield from public(node.body, inside=True)


def texts(nodes: list[tuple[str, ast.AST]], said: dict[int, str], alone: set[int]) -> dict[str, str]:
    "The comment behind each node, or the one above it."
    found = {}
    for name, node in nodes:
        behind = said.get(node.end_lineno) if node.end_lineno not in alone else None
        above = said.get(node.lineno - 1) if node.lineno - 1 in alone else None
        if text := behind or above: found[name] = text
    return found


def parts(node: Definition, said: dict[int, str], alone: set[int]) -> dict[str, dict[str, str]]:
    "What the docstring of a function or class lacks, by its head."
    if isinstance(node, ast.ClassDef):
        fields = [(n.target.id, n) for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id[0] != "_"]
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return {"Fields:": texts(fields, said, alone)} | (parts(made[0], said, alone) if made else {})
    a = node.args
    given = [x for x in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if x]
    first = node.body[0].lineno - 1
    # one line for several parameters: its comment is about the last one only, or about what is returned
    told = {"": node.returns} if node.returns and node.returns.end_lineno <= first and node.name != "__init__" else {}
    returns = texts(list(told.items()), said, alone).get("", "")
    ends = [(x, next((d for d in (*a.defaults, *a.kw_defaults) if d and d.lineno == x.lineno and d.col_offset > x.col_offset), x)) for x in given]
    lines = [x.lineno for x in given]
    named = [(x.arg, end) for x, end in ends if lines.count(x.lineno) == 1 and not (node.returns and x.lineno == node.returns.end_lineno)]
    return {"Args:": texts(named, said, alone), "Returns:": {"": returns} if returns else {}}


def rewritten(source: str) -> str:
    "A module with longer docstrings."
    (said, alone), lines = comments(source), source.splitlines(keepends=True)
    for node in sorted(public(ast.parse(source).body), key=lambda n: -n.lineno):
        doc = node.body[0]
        if not (isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)): continue
        start, end, text = doc.lineno - 1, doc.end_lineno, doc.value.value
        more = {head: found for head, found in parts(node, said, alone).items() if found}
        if not more or lines[start][: doc.col_offset].strip() or lines[end - 1].rstrip()[-1] not in "\"'" or any(h in text for h in HEADS): continue
        literal = re.fullmatch(r'(r?)("""|")(.*)\2', "".join(lines[start:end]).strip(), re.DOTALL)
        pad = " " * doc.col_offset
        derived = [f"{pad}{head}\n" + "".join(f"{pad}    {name}{': ' if name else ''}{escaped(what)}\n" for name, what in found.items()) for head, found in more.items()]
        lines[start:end] = [f'{pad}{literal[1]}"""{literal[3]}\n\n' + "".join(derived) + f'{pad}"""\n']
    return "".join(lines)


def escaped(text: str) -> str: return text.replace("\\", "\\\\").replace('"""', "'''")


def without(source: str) -> str:
    "A module as it was exported."
    kept, inside = [], False
    for line in source.split("\n"):
        if not inside and line.strip() in HEADS and kept[-1] == "":
            inside = True
            kept.pop()
        elif inside and line.strip() == '"""':
            inside, one = False, re.fullmatch(r' *r?"""(.*)', kept[-1])
            kept[-1] = kept[-1].replace('"""', '"') + '"' if one else kept[-1] + '"""'
        elif not inside: kept.append(line)
    return "\n".join(kept)


def main(package: Path) -> None:
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name != "_modidx.py" and (new := rewritten(source)) != source: path.write_text(new, encoding="utf-8")


if __name__ == "__main__": main(Path("caf_nb"))
