"""The site (`make docs`) and, with the tag `report`, the page of a run (`caf-report`). No notebook is run and nothing is fetched.

The source folder of the site is the root of the project, so that links between notebooks work here as they do on GitHub and in JupyterLab.
"""

import inspect
import json
import re
import shutil
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from pygments.lexers.special import TextLexer

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = {p.name: p for p in sorted(ROOT.glob("results/*/notebooks/*.ipynb"), reverse=True)}  # shown instead of the paper notebooks in nbs/, which hold no outputs; claims of profile frozen
REPORT = tags.has("report")  # noqa: F821, Sphinx defines `tags`

DONE = {}  # of a run: name of a notebook -> fingerprint, error, whether it ran before

project = "caf_nb"
author = "the caf_nb authors"
extensions = ["myst_nb"] + ([] if REPORT else ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode"])
root_doc = "index" if REPORT else "docs/index"
include_patterns = ["*.ipynb"] if REPORT else ["docs/**", "nbs/**"]
exclude_patterns = ["overview.ipynb"] if REPORT else [".*", "caf_nb", "out", "tests", "tools", "results", "**.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_remove_code_source = REPORT
nb_code_prompt_show = "Provenance: every setting, the checkpoints, the commit"  # of a cell tagged hide-output
nb_code_prompt_hide = nb_code_prompt_show
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"] if REPORT else []  # links to the library leave the page

html_theme = "pydata_sphinx_theme"
html_title = "caf_nb"
html_static_path = ["_static"]
html_css_files = ["caf_nb.css"]
html_show_sourcelink = html_copy_source = False
html_context = {"default_mode": "light"}
html_math_renderer = "mathml"
html_theme_options = {"navbar_end": [], "navbar_persistent": [] if REPORT else ["search-button-field"], "secondary_sidebar_items": [] if REPORT else ["page-toc"], "show_prev_next": True, "footer_start": [], "footer_end": [],
                      "header_links_before_dropdown": 20, "navigation_with_keys": False, "back_to_top_button": False}
html_sidebars = {"**": []} if REPORT else {}

# autodoc: what the modules export, in their order
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "model_config"}
autosummary_generate = False
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
default_role = "py:obj"


def api(app, config):
    "A page for each module, in the order of the notebooks. A package leaves out what is named as one of its modules."
    (ROOT / "docs/api").mkdir(exist_ok=True)
    for notebook in [*ROOT.glob("nbs/lib/*.ipynb"), *ROOT.glob("nbs/zoo/*.ipynb")]:
        found = re.search(r"#\| default_exp ([\w.]+)", notebook.read_text(encoding="utf-8"))
        if not found: continue
        module = found[1].removesuffix(".__init__")
        own = ", ".join(p.stem for p in (ROOT / "caf_nb" / module.replace(".", "/")).glob("*.py"))
        chapter = notebook.relative_to(ROOT).with_suffix("").as_posix()
        page = f"{module}\n{'=' * len(module)}\n\nExamples and tests: :doc:`/{chapter}`.\n\n.. automodule:: caf_nb.{module}\n" + (f"   :exclude-members: model_config, {own}\n" if own else "")
        (ROOT / "docs/api" / f"{notebook.stem}.rst").write_text(page)


def report(app, config):
    "Write the first page of a run: the overview, then a list of all notebooks."
    folder = Path(app.srcdir)
    DONE.update(json.loads((folder / "done.json").read_text()))
    names = [name for name in DONE if (folder / f"{name}.ipynb").is_file()]
    shown = {name: json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8")) for name in names}

    def line(name):
        text = f"- []({name}.ipynb)" if name in shown and name != "overview" else f"- {name}"
        _, error, reused = DONE[name]
        if error: return f"{text}: **stopped**, `` {error} ``"
        about = shown[name]["metadata"].get("papermill", {})
        return f"{text}: {about.get('duration') or 0:.0f} s" + (f", unchanged since {(about.get('end_time') or '')[:16].replace('T', ' ')}" if reused else "")

    profile = next((n["metadata"]["papermill"]["parameters"].get("profile") for n in shown.values() if "papermill" in n["metadata"]), "")
    listed = "\n".join([f"## All notebooks\n\nExecuted in profile {profile}.\n", *map(line, DONE), "\n```{toctree}\n:hidden:\n", *(n for n in names if n != "overview"), "```"])
    first = shown.get("overview", {"cells": [{"cell_type": "markdown", "metadata": {}, "source": "# caf_nb"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 4})
    first["cells"].append({"cell_type": "markdown", "id": "list", "metadata": {}, "source": listed})
    (folder / "index.ipynb").write_text(json.dumps(first), encoding="utf-8")


def failed(app, docname, source):
    "Say behind the title of a notebook why it stopped, in place of what papermill says before it. Links that leave the page become text."
    source[0] = re.sub(r"\[([^\[\]]+)\]\((?!http)[^()]*/[^()]+\.ipynb\)", r"\1", source[0])
    error = DONE.get(docname, ("", ""))[1]
    if not error: return
    shown = json.loads(source[0])
    cells = [c for c in shown["cells"] if "papermill-error-cell-tag" not in c["metadata"].get("tags", [])]
    note = {"cell_type": "markdown", "id": "stopped", "metadata": {}, "source": f"```{{error}}\nThis notebook stopped: `` {error} ``\n```"}
    source[0] = json.dumps(shown | {"cells": [*cells[:1], note, *cells[1:]]})


def notebook(app, docname, source):
    "Show a paper notebook as it was run in profile mini, frozen or real, without its code; leave out the cells of a library notebook that only nbdev reads."
    if not app.env.doc2path(docname).suffix == ".ipynb": return
    file = EXECUTED.get(f"{Path(docname).name}.ipynb")
    if Path(docname).parent.as_posix() == "nbs" and file:
        app.env.note_dependency(str(file))
        shown = json.loads(file.read_text(encoding="utf-8"))
        shown["metadata"]["mystnb"] = {"remove_code_source": True}
    else: shown = json.loads(source[0])
    shown["cells"] = [c for c in shown["cells"] if not "".join(c["source"]).startswith(("#| hide", "#| default_exp"))]
    source[0] = json.dumps(shown)


def docments(app, what, name, obj, options, lines):
    "Add the comments behind the parameters of a function and the fields of a class to its docstring."
    from fastcore.docments import docments
    fields = re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(obj), re.M) if what in ("class", "exception") else []
    described = dict(fields) or {k: v for k, v in docments(obj).items() if v} if what in ("class", "exception", "function", "method") else {}
    about = [f":returns: {text}" if name == "return" else f":param {name}: {text}" for name, text in described.items()]
    about = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line.replace("*", r"\*")) for line in about]
    if about: lines += ["", *about]


def mathml(display):
    "A visitor that writes a formula as MathML, which browsers show without a script."
    def visit(self, node):
        tag = "div" if display == "block" else "span"
        self.body.append(f'<{tag} class="math">{convert(node.astext(), display=display)}</{tag}>')
        raise SkipNode
    return visit


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(mathml("inline"), None), block_renderers=(mathml("block"), None))
    if REPORT:
        app.connect("config-inited", report)
        app.connect("source-read", failed)
        return
    app.add_lexer("mermaid", TextLexer)
    app.connect("config-inited", api)
    app.connect("source-read", notebook)
    app.connect("autodoc-process-docstring", docments)
