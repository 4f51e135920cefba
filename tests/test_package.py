"""The wheel holds the library and nothing else, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from caf_nb.data import write_png
from caf_nb.synth import SynthScenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")  # a copy: a build leaves files behind
    shutil.copytree(ROOT / "caf_nb", source / "caf_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "caf_nb").rglob("*") if p.suffix in (".py", ".safetensors", ".json", ".csv")}
    assert modules <= set(names)
    assert {Path(n).parts[0] for n in names if ".dist-info" not in n} == {"caf_nb"}


def test_works_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True)
    for scene in SynthScenes(2, 32, seed=0)[:2]:
        for kind, image in (("ir", scene.ir), ("vi", scene.vi)):
            (tmp_path / kind).mkdir(exist_ok=True)
            write_png(tmp_path / kind / f"{scene.stem}.png", image)
    code = "import caf_nb, sys; print(caf_nb.__file__); from caf_nb.cli import fuse_app; fuse_app()"
    arguments = ["--ir", "ir", "--vi", "vi", "--out", "fused"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(site)
    assert len(list((tmp_path / "fused").glob("*.png"))) == 2
