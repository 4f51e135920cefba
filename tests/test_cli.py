"""caf-fuse from the outside: one sentence for every mistake, and nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import caf_nb
from caf_nb import cli
from caf_nb.cli import fuse_app
from caf_nb.core import CafError
from caf_nb.data import luma, read_image, write_png
from caf_nb.fusion import FusionNet, save_fusion
from caf_nb.synth import SynthScenes
from caf_nb.zoo import METHODS, build_network, find_method


@pytest.fixture
def folder(tmp_path):
    "ir and vi with four good pairs of 32x48 pixels, out with results from yesterday, and weights."
    generator = torch.Generator().manual_seed(0)
    for kind, channels in (("ir", 1), ("vi", 3)):
        (tmp_path / kind).mkdir()
        for i in range(4):
            write_png(tmp_path / kind / f"{i}.png", torch.rand(channels, 32, 48, generator=generator))
    (tmp_path / "out").mkdir()
    for i in range(4):
        (tmp_path / "out" / f"{i}.png").write_bytes(b"from yesterday")
    save_fusion(tmp_path / "net.safetensors", FusionNet(), {})
    return tmp_path


def caf_fuse(folder, **changes):
    "Run caf-fuse on the folder; `changes` replaces options (None leaves one out, True is a flag)."
    options = {"ir": folder / "ir", "vi": folder / "vi", "out": folder / "out", "weights": folder / "net.safetensors", "overwrite": True, **changes}
    words = [w for name, value in options.items() if value is not None for w in ([f"--{name}"] + ([] if value is True else [str(value)]))]
    run = CliRunner().invoke(fuse_app, words)
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    assert "Traceback" not in run.output
    return run


def sentences(run):
    "What was said on stderr, without the progress bar."
    lines = [line.split("\r")[-1] for line in run.stderr.split("\n")]
    return [line for line in lines if line.startswith("caf-fuse: ")]


def contents(*folders):
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- what works

def test_all_pairs(folder):
    sources = contents(folder / "ir", folder / "vi")
    run = caf_fuse(folder)
    assert run.exit_code == 0 and sentences(run) == []
    said, engine, weights = run.stdout.splitlines()
    assert said.startswith("4 of 4 pairs fused in ") and said.endswith(f"written to {folder / 'out'}")
    assert weights == f"weights of CAF: {folder / 'net.safetensors'}" and engine.startswith("engine ")
    assert [read_image(folder / "out" / f"{i}.png").shape for i in range(4)] == [(3, 32, 48)] * 4
    assert contents(folder / "ir", folder / "vi") == sources
    assert "4/4" in run.stderr


def test_gray(folder):
    write_png(folder / "vi/1.png", read_image(folder / "ir/1.png").expand(3, -1, -1))  # gray in three channels
    caf_fuse(folder)
    assert [len(read_image(folder / "out" / f"{i}.png")) for i in range(4)] == [3, 1, 3, 3]
    caf_fuse(folder, gray=True)
    assert [len(read_image(folder / "out" / f"{i}.png")) for i in range(4)] == [1, 1, 1, 1]


def test_sources_as_methods(folder):
    caf_fuse(folder, method="ir", weights=None, gray=True, out=folder / "new/deep")
    assert all(torch.equal(read_image(folder / "new/deep" / f"{i}.png"), read_image(folder / "ir" / f"{i}.png")) for i in range(4))


def test_two_single_files(folder):
    run = caf_fuse(folder, ir=folder / "ir/0.png", vi=folder / "vi/3.png", out=folder / "one")
    assert run.exit_code == 0
    assert [p.name for p in (folder / "one").iterdir()] == ["3.png"]


def test_results_that_exist_stay(folder):
    "Without --overwrite they are skipped and counted, and what is missing is made."
    (folder / "out/2.png").unlink()
    run = caf_fuse(folder, overwrite=None)
    assert run.exit_code == 0 and run.stdout.startswith("1 of 1 pairs fused in ")
    assert run.stdout.splitlines()[1] == "3 skipped, since their results exist: --overwrite replaces them"
    assert read_image(folder / "out/2.png").shape == (3, 32, 48) and (folder / "out/1.png").read_bytes() == b"from yesterday"


def test_the_weights_are_named(folder):
    "Without --weights the line names the official file."
    last = caf_fuse(folder, weights=None).stdout.splitlines()[-1]
    assert "trained on synthetic scenes" in last and "Det_final.pth of https://github.com/RollingPlain/CAF_IVIF" in last


@pytest.mark.parametrize("method", ["tardal", "reconet", "didfuse", "sdnet", "umfusion", "defusion", "u2fusion"])
def test_weights_of_another_method(folder, method):
    "One short sentence says whose they are."
    for words in ({"method": method}, {"weights": other_weights(folder, method)}):
        run = caf_fuse(folder, **words)
        title = "CAF" if "method" in words else find_method(method).title
        assert run.exit_code == 1 and len(run.stderr.splitlines()) == 1
        assert f"this is a {title} checkpoint" in run.stderr and len(run.stderr) - len(str(folder)) < 300


def other_weights(folder, method):
    save_fusion(folder / f"{method}.safetensors", build_network(method), {})
    return folder / f"{method}.safetensors"


def test_several_methods(folder):
    "A folder each, the same in each as alone, and one sheet; names in any case; weights from a folder."
    other_weights(folder, "tardal")
    (folder / "net.safetensors").rename(folder / "caf.safetensors")
    run = caf_fuse(folder, method="CAF, TarDAL,mean", weights=folder, out=folder / "all")
    assert run.exit_code == 0 and sorted(p.name for p in (folder / "all").iterdir()) == ["caf", "mean", "sheet.png", "tardal"]
    caf_fuse(folder, weights=folder / "caf.safetensors")
    assert [p.read_bytes() for p in sorted((folder / "all/caf").iterdir())] == [p.read_bytes() for p in sorted((folder / "out").iterdir())]
    assert f"weights of TarDAL: {folder / 'tardal.safetensors'}" in run.stdout and "weights of mean" not in run.stdout


@pytest.mark.parametrize("changes, sentence", [
    ({"method": "caf,cfa", "weights": None}, "there is no method 'cfa'"), ({"method": "caf,tardal", "weights": None}, "method 'tardal' needs weights"),
    ({"method": "caf,mean"}, "net.safetensors: several methods need a folder of weights"),
    ({"method": "ir,vi", "weights": None, "out": "all.png"}, "all.png: is one file for several methods"),
    ({"out": "all.png"}, "all.png: is one file for 4 pairs")])
def test_several_methods_refused(folder, changes, sentence):
    before = contents(folder)
    run = caf_fuse(folder, **changes)
    assert run.exit_code == (2 if "no method" in sentence else 1) and len(run.stderr.splitlines()) == 1 and sentence in run.stderr
    assert contents(folder) == before


def test_one_file(folder):
    run = caf_fuse(folder, ir=folder / "ir/0.png", vi=folder / "vi/0.png", out=folder / "new/fused.png")
    assert run.exit_code == 0 and read_image(folder / "new/fused.png").shape == (3, 32, 48)
    assert caf_fuse(folder, ir=folder / "ir/0.png", vi=folder / "vi/0.png", out=folder / "vi/0.png").exit_code == 1


def test_shifted_cameras(tmp_path):
    "One sentence, with the shift; and none for the same scenes in place."
    for i, scene in enumerate(SynthScenes(4, 96, seed=2)):
        for kind, image in (("ir", scene.vi.mean(0, keepdim=True)), ("vi", scene.vi)):
            (tmp_path / kind).mkdir(exist_ok=True)
            write_png(tmp_path / kind / f"{i}.png", image[:, 8:-8, 8:-8])
            (tmp_path / f"off/{kind}").mkdir(exist_ok=True, parents=True)
            write_png(tmp_path / f"off/{kind}/{i}.png", image.roll((0, 6) if kind == "ir" else (0, 0), (1, 2))[:, 8:-8, 8:-8])
    assert sentences(caf_fuse(tmp_path, method="mean", weights=None)) == []
    assert ["about 0 rows and 6 columns off" in s for s in sentences(caf_fuse(tmp_path / "off", method="mean", weights=None))] == [True]


def test_plugin(folder):
    "A file with a METHOD is a method of that name, for this run."
    text(folder, "darker.py", "from torch import nn\nfrom caf_nb.zoo import Method\nclass Darker(nn.Module):\n    def forward(self, ir, vi): return ir.minimum(vi)\n"
                              "METHOD = Method(Darker, 'Darker', read=None)\n")
    try: run = caf_fuse(folder, plugin=folder / "darker.py", method="Darker,mean", weights=None, out=folder / "new")
    finally: METHODS.pop("darker", None)
    assert run.exit_code == 0 and sorted(p.name for p in (folder / "new").iterdir()) == ["darker", "mean", "sheet.png"]
    assert caf_fuse(folder, plugin=folder / "vi/0.png").exit_code == 1


def test_a_method_of_an_installed_package(folder, monkeypatch):
    "What a package registers is a method in any case of its name, and is listed with the others; a module that is not there is told."
    site, about = made(folder, "site"), made(folder / "site", "brighter-1.0.dist-info")
    text(site, "brighter.py", "from torch import nn\nfrom caf_nb.zoo import Method\nclass Brighter(nn.Module):\n    def forward(self, ir, vi): return ir.maximum(vi)\n"
                              "METHOD = Method(Brighter, 'Brighter', read=None)\n")
    text(about, "METADATA", "Metadata-Version: 2.1\nName: brighter\nVersion: 1.0\n")
    text(about, "entry_points.txt", "[caf_nb.methods]\nBrighter = brighter:METHOD\ngone = brighter_gone:METHOD\n")
    monkeypatch.syspath_prepend(site)
    run = caf_fuse(folder, method="BRIGHTER", weights=None, gray=True)
    assert run.exit_code == 0 and "brighter" not in METHODS
    ir, vi = (read_image(folder / kind / "0.png") for kind in ("ir", "vi"))
    assert (read_image(folder / "out/0.png") - ir.maximum(luma(vi))).abs().max() <= 1 / 255
    assert "reconet, u2fusion, tardal, brighter" in caf_fuse(folder, method="brightest", weights=None).stderr
    assert "method 'gone' has no module brighter_gone" in caf_fuse(folder, method="gone", weights=None).stderr


def test_swapped_folders(folder):
    "Names tell, and colour does; one sentence for the whole run, and two about infrared pictures in colour."
    run = caf_fuse(folder, ir=folder / "vi", vi=folder / "ir", method="ir,mean", weights=None)
    assert run.exit_code == 0 and ["look swapped" in s for s in sentences(run)] == [True, False, False]
    assert "channels of the infrared picture differ" in sentences(run)[1] and "and 3 more files" in sentences(run)[2]
    for kind, name in (("ir", "b"), ("vi", "a")): (folder / kind).rename(folder / name)
    assert "in colour and the visible one gray" in sentences(caf_fuse(folder, ir=folder / "a", vi=folder / "b"))[0]
    assert sentences(caf_fuse(folder, ir=folder / "b", vi=folder / "a")) == []


def test_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(fuse_app, ["--demo"])
    assert run.exit_code == 0 and run.stdout.endswith(f"{Path('caf-fuse-demo/sheet.png')}\n")
    assert len(list((tmp_path / "caf-fuse-demo/fused").iterdir())) == 4
    assert read_image(tmp_path / "caf-fuse-demo/sheet.png").shape == (3, 20 + 4 * 228, 3 * 228)
    assert CliRunner().invoke(fuse_app, ["--demo"]).stdout.startswith("4 of 4 pairs fused")


def test_json(folder):
    "One object on stdout, also where a pair fails."
    truncated(folder)
    run = caf_fuse(folder, json=True, method="mean", weights=None)
    found = json.loads(run.stdout)["mean"]
    assert (run.exit_code, len(found["fused"]), len(found["failures"])) == (1, 3, 1) and "1.png: cannot be decoded" in found["failures"][0]


def test_a_file_without_partner_is_told(folder):
    (folder / "ir/2.png").unlink()
    run = caf_fuse(folder)
    assert run.exit_code == 0 and sentences(run) == [f"caf-fuse: {folder / 'vi/2.png'}: has no partner and was left out."]
    assert (folder / "out/2.png").read_bytes() == b"from yesterday"


def test_a_warning_is_a_sentence(folder):
    import cv2
    cv2.imwrite(str(folder / "vi/0.png"), np.random.default_rng(0).integers(0, 255, (32, 48, 4), np.uint8))
    run = caf_fuse(folder)
    assert run.exit_code == 0 and "varying alpha channel is left out" in sentences(run)[0] and "UserWarning" not in run.stderr


def test_help_and_version():
    start = time.perf_counter()
    code = "import sys, caf_nb.cli as c; c.fuse_app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "--weights FILE" in run.stdout
    assert time.perf_counter() - start < 10
    assert CliRunner().invoke(fuse_app, ["--version"]).stdout == f"caf_nb {caf_nb.__version__}\n"


# ---------------------------------------------------------------- one bad pair

def differing_sizes(folder): write_png(folder / "vi/1.png", torch.rand(3, 32, 40))
def truncated(folder): (folder / "vi/1.png").write_bytes((folder / "vi/1.png").read_bytes()[:2000])
def text_as_png(folder): (folder / "vi/1.png").write_text("This is not a picture.")
def empty_file(folder): (folder / "vi/1.png").write_bytes(b"")
def a_folder_called_png(folder): (folder / "vi/1.png").unlink(); (folder / "vi/1.png").mkdir()
def link_to_nowhere(folder): (folder / "vi/1.png").unlink(); (folder / "vi/1.png").symlink_to("absent.png")


@pytest.mark.parametrize("damage, sentence", [(differing_sizes, "ir is 48x32 and vi 40x32 pixels"), (truncated, "cannot be decoded"), (text_as_png, "is not an image"),
                                              (empty_file, "is not an image"), (a_folder_called_png, "there is no such file"), (link_to_nowhere, "there is no such file")])
def test_one_bad_pair(folder, damage, sentence):
    damage(folder)
    run = caf_fuse(folder)
    assert run.exit_code == 1
    assert len(sentences(run)) == 1 and sentence in sentences(run)[0] and "1.png: " in sentences(run)[0]
    assert run.stdout.startswith("3 of 4 pairs fused")
    assert (folder / "out/1.png").read_bytes() == b"from yesterday"
    assert [read_image(folder / "out" / f"{i}.png").shape for i in (0, 2, 3)] == [(3, 32, 48)] * 3
    assert len(list((folder / "out").iterdir())) == 4  # no leftovers


# ---------------------------------------------------------------- nothing can be done

def text(folder, name, content="not the weights"):
    (folder / name).write_text(content)
    return folder / name


def other_network(folder):
    torch.save({"layer.weight": torch.zeros(3)}, folder / "other.pth")
    return folder / "other.pth"


def pickled_network(folder):
    torch.save(FusionNet(), folder / "module.pth")
    return folder / "module.pth"


def made(folder, name):
    (folder / name).mkdir()
    return folder / name


def renamed(folder):
    for file in (folder / "vi").iterdir(): file.rename(file.with_stem("x" + file.stem))
    return folder / "vi"


@pytest.mark.parametrize("option, value, sentence", [
    ("ir", lambda f: f / "absent", "absent: there is no such folder"),
    ("ir", lambda f: made(f, "none"), "none: the folder holds no image"),
    ("vi", lambda f: made(f, "none"), "none: the folder holds no image"),
    ("vi", renamed, "ir: no file has a partner of the same name in"),
    ("vi", lambda f: f / "vi/0.png", "0.png: one source is a file and the other is not"),
    ("out", lambda f: f / "ir", "ir: the output folder holds the source images"),
    ("out", lambda f: f / "out/../vi", "vi: the output folder holds the source images"),
    ("out", lambda f: text(f, "taken"), "taken: the output folder cannot be written (File exists)"),
    ("out", lambda f: text(f, "taken") / "below", "below: the output folder cannot be written (Not a directory)"),
    ("out", lambda f: Path("/proc/caf_nb"), "/proc/caf_nb: the output folder cannot be written"),
    ("out", lambda f: Path("/sys"), "/sys: the output folder cannot be written"),
    ("weights", lambda f: f / "absent.pth", "absent.pth: there is no such file"),
    *((option, lambda f: Path("a" * 300), "cannot be used (File name too long). Check the path.") for option in ("ir", "vi", "weights")),
    ("weights", lambda f: f / "ir", "ir: there is no such file"),
    ("weights", lambda f: text(f, "text.pth"), "text.pth: is no checkpoint"),
    ("weights", lambda f: text(f, "text.safetensors"), "text.safetensors: is no checkpoint"),
    ("weights", lambda f: text(f, "half.safetensors", "12345678{"), "half.safetensors: cannot be read as a checkpoint"),
    ("weights", lambda f: f / "ir/0.png", "0.png: is no checkpoint"),
    ("weights", other_network, "other.pth: the tensors do not fit the network: missing: "),
    ("weights", pickled_network, "module.pth: the checkpoint asks for caf_nb.fusion.FusionNet; only tensors come out"),
    ("method", lambda f: "ir", "net.safetensors: method 'ir' has no weights"),
])
def test_refused_before_any_work(folder, option, value, sentence):
    changed = {option: value(folder)}
    if str(changed[option]).startswith(("/proc", "/sys")) and (sys.platform != "linux" or changed[option] == Path("/sys") and writable("/sys")):
        pytest.skip("no such read-only place here")
    before = contents(folder)
    run = caf_fuse(folder, **changed)
    assert run.exit_code == 1 and run.stdout == ""
    assert len(sentences(run)) == len(run.stderr.splitlines()) == 1 and sentence in sentences(run)[0]
    assert contents(folder) == before


@pytest.mark.parametrize("option, value, sentence", [("method", "cfa", "there is no method 'cfa'. Choose one of caf, "),
                                                     ("device", "abacus", "device 'abacus' cannot be used here")])
def test_a_wrong_word_is_exit_code_2(folder, option, value, sentence):
    before = contents(folder)
    run = caf_fuse(folder, **{option: value})
    assert (run.exit_code, run.stdout) == (2, "") and sentence in run.stderr and len(run.stderr.splitlines()) == 1
    assert contents(folder) == before


def writable(place):
    try: os.close(os.open(place, os.O_TMPFILE | os.O_RDWR))
    except OSError: return False
    return True


def test_a_missing_option_is_exit_code_2(folder):
    run = caf_fuse(folder, vi=None)
    assert run.exit_code == 2 and "Invalid value for '--vi': it is missing; or try --demo" in run.stderr


# ---------------------------------------------------------------- the installed program

def program():
    path = shutil.which("caf-fuse", path=str(Path(sys.executable).parent)) or shutil.which("caf-fuse")
    if path is None: pytest.skip("caf-fuse is not installed")
    return path


def test_installed_program(folder):
    "The console script: exit code, one sentence, no traceback."
    truncated(folder)
    options = [program(), "--ir", folder / "ir", "--vi", folder / "vi", "--out", folder / "out", "--method", "vi", "--overwrite"]
    run = subprocess.run(options, capture_output=True, text=True)
    assert (run.returncode, run.stdout.split(" in ")[0]) == (1, "3 of 4 pairs fused")
    assert f"caf-fuse: {folder / 'vi/1.png'}: cannot be decoded" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_interrupt(folder):
    "Ctrl-C in the middle: no traceback, whole pictures only."
    for i in range(4, 2000):
        for kind in ("ir", "vi"): (folder / kind / f"{i}.png").symlink_to(folder / kind / "0.png")
    out = folder / "new"
    run = subprocess.Popen([program(), "--ir", folder / "ir", "--vi", folder / "vi", "--out", out, "--weights", folder / "net.safetensors"],
                           stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell lets what it starts in the background ignore it
    limit = time.monotonic() + 120
    while not list(out.glob("*.png")) and run.poll() is None and time.monotonic() < limit: time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode not in (0, -signal.SIGINT) and "Traceback" not in stderr
    assert 0 < len(list(out.iterdir())) < 2000
    for path in out.iterdir(): assert read_image(path).shape == (3, 32, 48)


def test_a_failed_stage_is_one_sentence(capsys):
    "exca would print the traceback of the error as well, and does outside of a command."
    from exca import logconf
    from exca.task import LocalJob, logger

    def fail(): raise CafError("the disk is full", "stage")
    with patch.object(logconf._handler, "stream", sys.stderr), patch.object(logger, "disabled", False):
        assert LocalJob(fail).exception() and "Traceback" in capsys.readouterr().err
        with pytest.raises(typer.Exit), cli._errors_as_text("caf-search"): LocalJob(fail).result()
        assert capsys.readouterr().err == "caf-search: stage: the disk is full.\n"
