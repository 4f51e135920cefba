"""Write the screenshots of the site, docs/_static/screenshots/*.jpg, by the browser test. Needs a Chromium (Debian: apt-get install chromium).

Run from the root of the project: .venv/bin/python tools/screenshots.py
"""

import os
import subprocess
import sys
from pathlib import Path

folder = Path(__file__).resolve().parents[1] / "docs/_static/screenshots"
folder.mkdir(exist_ok=True)
sys.exit(subprocess.call([sys.executable, "-m", "pytest", "tests/test_browser.py", *sys.argv[1:]], env=os.environ | {"CAF_SCREENSHOTS": str(folder)}))
