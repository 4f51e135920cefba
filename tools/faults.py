"""Put hostile and broken files through every reader and command, and count what comes of it.

Run from the root of the project: .venv/bin/python tools/faults.py [--draw N] [--kills N]
Each file is tried in a fork, with sockets forbidden. `read`: it was read after all. `refused well`: one CafError of fewer than 400 printable characters that names the
file, or exit code 1 and no traceback. `else`: anything else, which is listed. `--kills N` kills N trainings of each kind, searches, stages, caf-fuse and reports instead.
Exit code 1 if anything else happened, a file ran code, or 500 MB were exceeded."""

import argparse
import gc
import json
import os
import random
import signal
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

torch.set_num_threads(1)

from typer.testing import CliRunner  # noqa: E402

import corpus  # noqa: E402
from caf_nb.checkpoints import read_tensors  # noqa: E402
from caf_nb.cli import data_app, eval_app, fuse_app  # noqa: E402
from caf_nb.core import CafError  # noqa: E402
from caf_nb.data import image_size, listed_names, read_blocks, read_image, read_mask, read_pair, read_split, read_yolo, write_png  # noqa: E402
from caf_nb.data.sets import _read_voc  # noqa: E402
from caf_nb.fusion import fuse_folder, load_fusion  # noqa: E402
from caf_nb.loop import read_state  # noqa: E402
from caf_nb.losses.vgg import load_vgg  # noqa: E402
from caf_nb.rows import Cell, read_cell  # noqa: E402
from caf_nb.search import SearchResult  # noqa: E402
from caf_nb.stages.own_data import read_layout  # noqa: E402
from caf_nb.synth import SynthScenes  # noqa: E402
from caf_nb.tasks import DeepLab, Detector, Segmenter  # noqa: E402

READERS = dict[str, Callable[[Path], Any]]


def folder_of(name: str) -> Callable[[Path], Any]:
    "The file as the weights in a folder of SegFormer."
    def read(file: Path) -> Any:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            (Path(folder) / "config.json").write_text("{}")
            (Path(folder) / name).symlink_to(file)
            return Segmenter(("car",), weights=folder)
    return read


def command(app: Any, *words: object) -> None:
    "Run a command; exit code 1 with printable sentences is a refusal."
    run = CliRunner().invoke(app, [str(w) for w in words])
    if run.exception and not isinstance(run.exception, SystemExit): raise run.exception
    lines = [line.rpartition("\r")[2] for line in run.stderr.split("\n") if "caf-" in line]
    if not all(line.isprintable() and len(line) < 420 for line in lines): raise RuntimeError(f"printed {lines[:1]!r}"[:300])
    if run.exit_code: raise CafError(lines[-1][:300] if lines else "refused", "the command")


def checkpoint_readers() -> READERS:
    methods = "caf", "didfuse", "sdnet"  # an error of one tries the readers of all others as well
    return {"read_tensors": read_tensors, "read_state": lambda f: read_state(f, {"a": "b"}), "load_vgg": load_vgg, **{m: lambda f, m=m: load_fusion(m, f, "cpu") for m in methods},
            "SearchResult": SearchResult.load, "Detector": lambda f: Detector(("car",), weights=f), "DeepLab": lambda f: DeepLab(f), "Segmenter": folder_of("pytorch_model.bin"), "Segmenter, safetensors": folder_of("model.safetensors")}


def picture_readers(scratch: Path) -> READERS:
    good = {kind: scratch / f"good-{kind}.png" for kind in ("ir", "vi")}
    for kind, file in good.items(): write_png(file, getattr(SynthScenes(1, (48, 64), 1)[0], kind))

    def pair(file: Path, app: Any) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            root = Path(place)
            for kind in ("ir", "vi"):
                (root / kind).mkdir()
                shutil.copy(good[kind], root / kind / "b.png")
            (root / "ir/a.png").symlink_to(file)
            shutil.copy(good["vi"], root / "vi/a.png")
            sources = ("--ir", root / "ir", "--vi", root / "vi")
            if app is data_app: command(app, "check", root, "--dataset", "roadscene")
            elif app is fuse_app: command(app, *sources, "--out", root / "out", "--method", "mean")
            else: command(app, *sources, "--fused", root / "ir", "--out", root / "a.csv", "--metrics", "SD")
    return {"read_image": read_image, "image_size": image_size, "read_mask": lambda f: read_mask(f, 256), "read_pair": lambda f: read_pair(f, good["vi"]), "read_pair, same": lambda f: read_pair(f, f),
            "caf-fuse": lambda f: pair(f, fuse_app), "caf-eval": lambda f: pair(f, eval_app), "caf-data check": lambda f: pair(f, data_app)}


def read_cell_file(file: Path) -> Cell:
    class Stage:
        def __getattr__(self, name: str) -> Any: return self
        def __call__(self, *_: Any) -> Any: return {}
    return read_cell(Stage(), file)


def label_readers() -> READERS:
    return {"VOC": lambda f: _read_voc(f, (64, 48)), "YOLO": lambda f: read_yolo(f, ("a", "b")), "names": listed_names, "split": read_split, "blocks": read_blocks, "own data": read_layout,
            "SearchResult": SearchResult.load, "cell": read_cell_file}


def _late(*_: object) -> None: raise TimeoutError("it did not end")


def tried(reader: Callable[[Path], Any], file: Path) -> str:
    "read, refused well, or what else came of it; a minute is too long."
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(60)
    try: reader(file)
    except CafError as error:
        text = str(error)
        named = error.file is not None or file.name[:20] in text
        return "refused well" if len(text) < 400 and text.isprintable() and named else f"else: a poor sentence: {text[:150]!a}"
    except BaseException as error: return f"else: {type(error).__name__}: {str(error)[:120]!a}"
    finally: signal.alarm(0)
    return "read"


def no_sockets() -> None:
    def forbidden(*_: Any, **__: Any) -> None: raise RuntimeError("a socket")
    socket.socket = forbidden  # type: ignore[misc,assignment]


def memory(name: str) -> float:
    "A line of this process's status, in MB."
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1024


def fork(work: Callable[[], dict[str, str]]) -> tuple[dict[str, str], float]:
    "What `work` gives in a fork with standard error caught, and how many MB it needed beyond what the fork began with."
    gc.collect()
    file = Path(tempfile.mkstemp()[1])
    pid = os.fork()
    if not pid:
        try:
            no_sockets()
            os.dup2(os.open(file.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), 2)
            before = memory("VmRSS")
            file.write_text(json.dumps([work(), memory("VmHWM") - before]))
        finally: os._exit(0)
    os.waitpid(pid, 0)
    found, used = json.loads(file.read_text() or '[{"process": "else: it died"}, 0]')
    if noise := file.with_suffix(".err").read_text(errors="replace").strip(): found["stderr"] = f"else: printed {noise[:150]!a}"
    for path in (file, file.with_suffix(".err")): path.unlink()
    return found, used


def run(kind: str, files: Iterable[Path], readers: READERS) -> tuple[Counter[str], float, list[str]]:
    "Counts, the peak in MB, and what else happened."
    counts, peak, odd = Counter[str](), 0., []
    for file in files:
        found, used = fork(lambda: {name: tried(reader, file) for name, reader in readers.items()})
        counts.update(value.partition(":")[0] for value in found.values())
        odd += [f"{kind} {file.name[:60]!a}, {name}: {value}" for name, value in found.items() if value.startswith("else")]
        if used > 500: odd.append(f"{kind} {file.name[:60]!a}: {used:.0f} MB")
        peak = max(peak, used)
    return counts, peak, odd


def kill_trainings(kills: int) -> int:
    "Kill each training at random moments until there were so many kills; gives how many ended with other bits."
    wrong = 0
    for kind in ("fusion", "segmenter", "joint", "detector"):
        with tempfile.TemporaryDirectory() as place:
            done = subprocess.run([sys.executable, str(ROOT / "tests/killed.py"), kind, place, str(kills)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"kills": 0, "trainings": [(0, False)]}
        bad = sum(not same for _, same in found["trainings"])
        print(f"{kind}: {found['kills']} kills in {len(found['trainings'])} trainings, {bad} ended with other bits", flush=True)
        wrong += bad
    return wrong


def kill_fuse(kills: int) -> int:
    "Kill caf-fuse at random moments; gives how many pictures were not whole, or not as those of a run in peace."
    scenes, wrong = SynthScenes(12, (96, 128), 3)[:], 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for kind in ("ir", "vi"):
            (root / kind).mkdir()
            for scene in scenes: write_png(root / kind / f"{scene.stem}.png", getattr(scene, kind))
        net = load_fusion("caf", device="cpu")
        fuse_folder(net, root / "ir", root / "vi", root / "whole", progress=False)
        for i in range(kills):
            pid = os.fork()
            if not pid:
                fuse_folder(net, root / "ir", root / "vi", root / f"out{i}", progress=False)
                os._exit(0)
            time.sleep(random.Random(i).uniform(0.02, 0.8))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            left = list((root / f"out{i}").glob("*.png")) if (root / f"out{i}").exists() else []
            wrong += sum(file.read_bytes() != (root / "whole" / file.name).read_bytes() for file in left)
            fuse_folder(net, root / "ir", root / "vi", root / f"out{i}", progress=False, overwrite=False)
            wrong += sum(file.read_bytes() != (root / f"out{i}" / file.name).read_bytes() for file in (root / "whole").glob("*.png"))
    print(f"caf-fuse: {kills} kills, {wrong} pictures were not whole, or not the same after a second run", flush=True)
    return wrong


def main(draw: int = 1, only: str = "") -> int:
    warnings.simplefilter("ignore")
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        parts = {"checkpoints": (corpus.checkpoints(root / "owned"), checkpoint_readers()), "pictures": (corpus.pictures(), picture_readers(root)), "labels": (corpus.labels(), label_readers())}
        for kind, (makes, readers) in parts.items():
            if only not in kind: continue
            files = corpus.write(dict(list(makes.items())[::draw]), root / kind)
            counts, peak, odd = run(kind, files, readers)
            print(f"{kind}: {len(files)} files x {len(readers)} readers, {counts.total()} tried: {counts['refused well']} refused well, {counts['read']} read, {counts['else']} anything else; "
                  f"peak {peak:.0f} MB beyond the imports", flush=True)
            print(*odd, sep="\n", end="\n" * bool(odd), flush=True)
            failures += len(odd)
        ran = (root / "owned").exists()
        print(f"code ran: {int(ran)}")
    return failures + ran


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=1, help="every N-th file only")
    parser.add_argument("--only", default="", help="checkpoints, pictures or labels")
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    sys.exit(1 if (kill_fuse(given.kills) + kill_trainings(given.kills) if given.kills else main(given.draw, given.only)) else 0)
