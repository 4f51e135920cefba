"""Put hostile and broken files through every reader and command, and count what comes of it.

Run from the root of the project: .venv/bin/python tools/faults.py [--draw N] [--only KIND] [--kills N]
Each file is tried in a fork, with sockets forbidden. `read`: it was read after all. `refused well`: one CafError of fewer than 400 printable characters that names the
file, or exit code 1 and no traceback. `else`: anything else, which is listed. `--kills N` kills trainings of each kind, searches, stages, caf-fuse and reports instead,
N times each. Exit code 1 if anything else happened, a file ran code, or a file needed 500 MB."""

import argparse
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

torch.set_num_threads(1)

import pandas as pd  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import corpus  # noqa: E402
from caf_nb.checkpoints import read_tensors  # noqa: E402
from caf_nb.cli import data_app, eval_app, fuse_app, search_app  # noqa: E402
from caf_nb.core import CafError  # noqa: E402
from caf_nb.data import image_size, listed_names, read_blocks, read_image, read_mask, read_pair, read_split, read_yolo, write_png  # noqa: E402
from caf_nb.data.sets import _read_voc  # noqa: E402
from caf_nb.fusion import load_fusion  # noqa: E402
from caf_nb.hypergradient.oracle import textbook_space  # noqa: E402
from caf_nb.loop import read_state  # noqa: E402
from caf_nb.losses.vgg import load_vgg  # noqa: E402
from caf_nb.rows import Cell, read_cell  # noqa: E402
from caf_nb.search import SearchResult  # noqa: E402
from caf_nb.stages.own_data import check_own, read_layout  # noqa: E402
from caf_nb.synth import SynthScenes  # noqa: E402
from caf_nb.tasks import DeepLab, Detector, Segmenter  # noqa: E402
from caf_nb.zoo import METHODS, find_method  # noqa: E402

Reader = Callable[[Path], Any]
READERS = dict[str, Reader]
Case = tuple[str, float, float]  # what came of it, MB beyond what the fork began with, seconds
MOST = 500  # MB


def folder_of(name: str, load: Callable[[str], Any], file: Path) -> Any:
    "The file as `name` in a folder of weights."
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        (Path(folder) / "config.json").write_text("{}")
        (Path(folder) / name).symlink_to(file)
        return load(folder)


def segmenter(folder: str) -> Any: return Segmenter(("car",), weights=folder)


def hub_model(folder: str) -> Any:
    from caf_nb.zoo.export import FusionModel
    return FusionModel.from_pretrained(folder)


def command(app: Any, *words: object) -> None:
    "Run a command; exit code 1 with printable sentences is a refusal."
    run = CliRunner().invoke(app, [str(w) for w in words])
    if run.exception and not isinstance(run.exception, SystemExit): raise run.exception
    lines = [line.rpartition("\r")[2] for line in run.stderr.split("\n") if "caf-" in line]
    if not all(line.isprintable() and len(line) < 420 for line in lines): raise RuntimeError(f"printed {lines[:1]!r}"[:300])
    if odd := [line for line in run.stdout.split("\n") if not line.isprintable()]: raise RuntimeError(f"printed {odd[:1]!r}"[:300])
    if run.exit_code: raise CafError(lines[-1][:300] if lines else "refused", "the command")


def pairs(root: Path, labels: str = "") -> Path:
    "A folder with a whole pair, b, and perhaps its label."
    scene = SynthScenes(1, (48, 64), 1)[0]
    for kind in ("ir", "vi"):
        (root / kind).mkdir(parents=True, exist_ok=True)
        write_png(root / kind / "b.png", getattr(scene, kind))
    if labels:
        (root / labels).mkdir()
        (root / labels / "b.txt").write_text("0 .5 .5 .3 .4\n")
        (root / "data.yaml").write_text(f"ir: ir\nvi: vi\nlabels: {labels}\nnames: [a, b]\n")
    return root


def in_copy(scratch: Path, labels: str, use: Callable[[Path, Path], Any], file: Path) -> Any:
    "`use` of the file and of a fresh folder of `pairs`."
    with tempfile.TemporaryDirectory(dir=scratch) as place: return use(file, pairs(Path(place), labels))


def checkpoint_readers(scratch: Path) -> READERS:
    "An error of one method tries the readers of all others as well."
    def fused(file: Path, root: Path) -> None: command(fuse_app, "--ir", root / "ir", "--vi", root / "vi", "--out", root / "out", "--weights", file)
    def searched(file: Path, root: Path) -> None: command(search_app, root / "data.yaml", "--out", root / "out", "--loss", file)
    methods = [name for name in METHODS if find_method(name).read is not None]
    return {"read_tensors": read_tensors, "read_state": lambda f: read_state(f, {"a": "b"}), "load_vgg": load_vgg, "textbook_space": lambda f: textbook_space("paper", f, "none"), **{m: lambda f, m=m: load_fusion(m, f, "cpu") for m in methods},
            "SearchResult": SearchResult.load, "Detector": lambda f: Detector(("car",), weights=f), "DeepLab": lambda f: DeepLab(f), "Segmenter": partial(folder_of, "pytorch_model.bin", segmenter),
            "Segmenter, safetensors": partial(folder_of, "model.safetensors", segmenter), "Segmenter, index": partial(folder_of, "model.safetensors.index.json", segmenter), "FusionModel": partial(folder_of, "model.safetensors", hub_model),
            "caf-fuse --weights": partial(in_copy, scratch, "", fused), "caf-search --loss": partial(in_copy, scratch, "labels", searched)}


def as_infrared(file: Path, root: Path) -> Path:
    "The file as the infrared picture of a second pair, a."
    (root / "ir/a.png").symlink_to(file)
    shutil.copy(root / "vi/b.png", root / "vi/a.png")
    if (root / "labels").exists(): shutil.copy(root / "labels/b.txt", root / "labels/a.txt")
    return root


def check_layout(file: Path, root: Path) -> None:
    "What caf-search does before anything else."
    if not (found := check_own(read_layout(as_infrared(file, root) / "data.yaml"), progress=False)).ok: raise CafError(found.text().partition("\n")[0][:200], root)


def picture_readers(scratch: Path) -> READERS:
    good = pairs(scratch / "good") / "vi/b.png"

    def folders(*words: Any, app: Any, own: str = "") -> Reader:
        def use(file: Path, root: Path) -> None:
            as_infrared(file, root)
            command(app, *[root / word[1:] if word[0] == "/" else word for word in words])
        return partial(in_copy, scratch, own, use)

    sources = "--ir", "/ir", "--vi", "/vi"
    return {"read_image": read_image, "image_size": image_size, "read_mask": lambda f: read_mask(f, 256), "read_pair": lambda f: read_pair(f, good), "read_pair, same": lambda f: read_pair(f, f),
            "caf-fuse": folders(*sources, "--out", "/out", "--method", "mean", app=fuse_app), "caf-eval": folders(*sources, "--fused", "/vi", "--out", "/a.csv", "--metrics", "SD", app=eval_app),
            "caf-eval, fused": folders("--ir", "/vi", "--vi", "/vi", "--fused", "/ir", "--out", "/a.csv", "--metrics", "SD", app=eval_app), "caf-data check": folders("check", "/", "--dataset", "roadscene", app=data_app),
            "caf-data prepare": folders("prepare", "/", "--dataset", "roadscene", "--out", "/out", "--size", "16", "--blocks", "2", app=data_app), "caf-search": partial(in_copy, scratch, "labels", check_layout)}


def read_cell_file(file: Path) -> Cell:
    class Stage:
        def __getattr__(self, name: str) -> Any: return self
        def __call__(self, *_: Any) -> Any: return {}
    return read_cell(Stage(), file)


def label_readers(scratch: Path) -> READERS:
    def checked(file: Path, root: Path) -> None:
        "The file as a label, or as data.yaml."
        place = root / "data.yaml" if file.suffix == ".yaml" else root / f"labels/b{file.suffix}"
        for old in (place, root / "labels/b.txt"): old.unlink(missing_ok=place != root / "data.yaml" or old == place)
        if place.name == "data.yaml": (root / "labels/b.txt").write_text("0 .5 .5 .3 .4\n")
        place.symlink_to(file)
        command(data_app, "check", root, "--dataset", "folder", "--names", "a,b")
    def split(file: Path, root: Path) -> None: command(data_app, "check", root, "--dataset", "roadscene", "--split", file)
    def searched(file: Path, root: Path) -> None: command(search_app, file, "--out", root / "out")
    return {"VOC": lambda f: _read_voc(f, (64, 48)), "YOLO": lambda f: read_yolo(f, ("a", "b")), "names": listed_names, "split": read_split, "blocks": read_blocks, "own data": read_layout,
            "SearchResult": SearchResult.load, "cell": read_cell_file, "caf-data check": partial(in_copy, scratch, "labels", checked), "caf-data check --split": partial(in_copy, scratch, "", split),
            "caf-search": partial(in_copy, scratch, "", searched)}


def _late(*_: object) -> None: raise TimeoutError("it did not end")


def tried(reader: Reader, file: Path) -> str:
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


def cases(file: Path, readers: READERS) -> dict[str, Case]:
    "A file through every reader; the peak of memory is set back before each."
    begun, found = memory("VmRSS"), {}
    for name, reader in readers.items():
        Path("/proc/self/clear_refs").write_text("5")
        start, verdict = time.perf_counter(), tried(reader, file)
        found[name] = verdict, memory("VmHWM") - begun, time.perf_counter() - start
    return found


def fork(work: Callable[[], dict[str, Case]]) -> dict[str, Case]:
    "What `work` gives in a fork with standard error caught."
    gc.collect()
    file = Path(tempfile.mkstemp()[1])
    pid = os.fork()
    if not pid:
        try:
            no_sockets()
            os.dup2(os.open(file.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            file.write_text(json.dumps(work()))
        finally: os._exit(0)
    os.waitpid(pid, 0)
    found = json.loads(file.read_text() or '{"process": ["else: it died", 0, 0]}')
    if noise := file.with_suffix(".err").read_text(errors="replace").strip(): found["stderr"] = f"else: printed {noise[:150]!a}", 0, 0
    for path in (file, file.with_suffix(".err")): path.unlink()
    return found


def run(files: Sequence[Path], readers: READERS, folder: Path) -> pd.DataFrame:
    "A row a case. What readers import late, every fork would import anew: files of no kind are read by all of them before."
    for end in {file.suffix for file in files}:
        (warm := folder / f"b{end}").write_text("no file of any kind")
        for reader in readers.values(): tried(reader, warm)
    return pd.DataFrame([(file.name, name, *case) for file in files for name, case in fork(lambda: cases(file, readers)).items()], columns=["file", "reader", "found", "mb", "seconds"])


def table(frame: pd.DataFrame) -> pd.DataFrame:
    "Counts and the peak by reader, and of all."
    kind = frame.found.str.partition(":")[0]
    found = pd.crosstab(frame.reader, kind).reindex(columns=["refused well", "read", "else"], fill_value=0).loc[list(dict.fromkeys(frame.reader))]
    found.insert(0, "tried", found.sum(axis=1))
    found.loc["all"] = found.sum()
    return found.assign(**{"peak MB": pd.concat([frame.groupby("reader").mb.max(), pd.Series({"all": frame.mb.max()})]).round().astype(int)})


def kill(kinds: Iterable[str], kills: int) -> int:
    "Kill each kind of run at random moments, and resume it, until there were so many kills; gives how many ended with other bits."
    wrong = 0
    for kind in kinds:
        with tempfile.TemporaryDirectory() as place:
            done = subprocess.run([sys.executable, str(ROOT / "tests/killed.py"), kind, place, str(kills)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        if done.returncode: print(f"{kind}: {done.stderr[-500:]}", flush=True)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"kills": 0, "trainings": [(0, False)], "all_s": 0}
        bad = sum(not same for _, same in found["trainings"])
        print(f"{kind}: {found['kills']} kills in {len(found['trainings'])} runs, {bad} ended with other bits, {found['all_s']:.0f} s", flush=True)
        wrong += bad
    return wrong


def main(draw: int = 1, only: str = "") -> int:
    warnings.simplefilter("ignore")
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "scratch").mkdir()
        parts = {"checkpoints": (corpus.checkpoints(root / "owned"), checkpoint_readers), "pictures": (corpus.pictures(), picture_readers), "labels": (corpus.labels(), label_readers)}
        for kind, (makes, readers) in parts.items():
            if only not in kind: continue
            files = corpus.write(dict(list(makes.items())[::draw]), root / kind)
            frame = run(files, readers(root / "scratch"), root / "scratch")
            odd = frame[frame.found.str.startswith("else") | (frame.mb > MOST)]
            print(f"{kind}: {len(files)} files, {frame.seconds.sum():.0f} s\n{table(frame).to_string()}", flush=True)
            for case in odd.itertuples(): print(f"{case.file[:60]!a}, {case.reader}: {case.found}, {case.mb:.0f} MB", flush=True)
            failures += len(odd)
        ran = (root / "owned").exists()
        print(f"code ran: {int(ran)}")
    return failures + ran


KINDS = "fusion", "search", "segmenter", "joint", "detector", "stages", "fuse", "report"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=1, help="every N-th file only")
    parser.add_argument("--only", default="", help="checkpoints, pictures or labels; with --kills: fusion, search, ...")
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    sys.exit(1 if (kill([kind for kind in KINDS if given.only in kind], given.kills) if given.kills else main(given.draw, given.only)) else 0)
