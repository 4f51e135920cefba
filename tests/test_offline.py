"""Nothing here may need, or even try, the network; and the optional libraries are optional."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest_socket = pytest.importorskip("pytest_socket")

FORBID_SOCKETS = """
import socket
import pytest_socket

attempts = []
def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("no network in this test")

pytest_socket.disable_socket()
for name in ("getaddrinfo", "gethostbyname", "create_connection"): setattr(socket, name, refuse)
class Refused(socket.socket):
    def __new__(cls, *args, **kwargs): refuse(*args)
socket.socket = Refused
"""

TRAIN = """
import pathlib, tempfile
import torch
from caf_nb.config import Profile
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES
from caf_nb.synth import SynthScenes
from caf_nb.tasks import DeepLab, Detector, Segmenter, contained_ultralytics
from caf_nb.train import finetune_detector, finetune_segmenter, write_yolo_folder

with contained_ultralytics():
    from ultralytics.utils.events import events
events.enabled = True  # as on the machine of somebody who never switched the statistics off

smoke, root = Profile.named("smoke"), pathlib.Path(tempfile.mkdtemp())
once = smoke.detector.model_copy(update={"epochs": 1})
scenes = list(SynthScenes(4, 64))
for split in ("train", "val", "test"):
    data = write_yolo_folder(root, split, [s.vi for s in scenes], [s.boxes for s in scenes], [s.stem for s in scenes], M3FD_CLASSES)
detector = Detector(M3FD_CLASSES)
finetune_detector(detector, data, once, 64, root/"run", device="cpu", progress=False)
finetune_detector(detector, data, once, 64, root/"best", device="cpu", progress=False, select_best=True)
assert Detector(M3FD_CLASSES, weights=root/"run"/"weights"/"last.pt").provenance.startswith("last.pt (SHA-256 ")

pairs = [(s.vi, s.mask) for s in scenes]
steps = smoke.segmenter.model_copy(update={"steps": 2})
result = finetune_segmenter(Segmenter(MFNET_CLASSES), pairs, pairs, steps, root/"segmenter", progress=False)
Segmenter(MFNET_CLASSES, weights=result.checkpoint)

deeplab = DeepLab(seed=1)
torch.save({"model_state": deeplab.net.state_dict()}, root/"deeplab.pth")
DeepLab(root/"deeplab.pth").predict(scenes[0].vi[None])
assert not attempts, attempts
print("trained without the network")
"""

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ultralytics", "transformers", "segmentation_models_pytorch"): raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Hidden())
"""

WITHOUT = """
import caf_nb.tasks, caf_nb.train
from caf_nb.core import CafError
for build in (caf_nb.tasks.Detector, caf_nb.tasks.Segmenter, lambda classes: caf_nb.tasks.DeepLab(classes=classes)):
    try: build(("a", "b"))
    except CafError as error: assert 'pip install "caf_nb[tasks]"' in str(error), error
    else: raise AssertionError("built without its library")
print("stopped politely")
"""


def run(code: str, home) -> str:
    "Run `code` as a new user on a fresh machine: empty home, empty current folder, no settings in the environment."
    (home / "work").mkdir()
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "ULTRALYTICS_", "HF_", "TRANSFORMERS_", "XDG_", "PYTEST_"))}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=ours | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
                          cwd=home / "work", capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_training_with_sockets_forbidden(tmp_path):
    assert run(FORBID_SOCKETS + TRAIN, tmp_path) == "trained without the network\n"
    assert list((tmp_path / "work").iterdir()) == []  # no runs/, no weights/ where the user happened to be
    left = [p for p in tmp_path.rglob("*") if "ultralytics" in p.name.lower() or p.suffix in (".ttf", ".pt")]
    assert left == []  # no settings, font or network in the home folder


def test_the_refusal_itself_works(tmp_path):
    code = FORBID_SOCKETS + "try: __import__('urllib.request').request.urlopen('http://example.org')\nexcept OSError: print(len(attempts))"
    assert run(code, tmp_path) == "1\n"


def test_without_the_optional_libraries(tmp_path):
    assert run(HIDE + WITHOUT, tmp_path) == "stopped politely\n"
