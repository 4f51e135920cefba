"""Put the results of profile mini into README.md, between its two marks.

Run from the root of the project, after `make report PROFILE=mini`: .venv/bin/python tools/readme.py
"""

import re
from pathlib import Path

from caf_nb.config import Profile
from caf_nb.report import results_summary

BLOCK = re.compile(r"(<!-- results: [^\n]*-->\n).*?(<!-- end of results -->)", re.DOTALL)
readme = Path("README.md")
text, n = BLOCK.subn(lambda m: f"{m[1]}{results_summary('results/mini', Profile.named('mini'))}\n{m[2]}", readme.read_text(encoding="utf-8"))
if n != 1:
    raise SystemExit("README.md needs one block between <!-- results: ... --> and <!-- end of results -->")
readme.write_text(text, encoding="utf-8")
