"""Run by test_training.py in a process of its own: trainings, stages, folders of pictures and reports that are killed with SIGKILL and resumed.

    python killed.py KIND FOLDER KILLS

One process imports the libraries and makes the data; each run of a training is a fork of it, which saves the seconds of importing. (The parent never computes, so that
no thread is lost in the fork.) The training is run once in peace, then again and again with kills at random moments until it has ended, and that until there were KILLS
kills. What is printed, as JSON, is for the test to judge. A report's kernels have to end with it."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

from caf_nb.config import DetectorSettings, FusionSettings, SearchSettings, SegmenterSettings
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, write_png
from caf_nb.fusion import FusionNet, fuse_folder, load_fusion
from caf_nb.losses import LossSpace, RELEASED
from caf_nb.search import search
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter, contained_ultralytics
from caf_nb.train import caf_recipe, finetune_detector, finetune_segmenter, train_fusion, train_joint, write_yolo_folder
from caf_nb.zoo import find_method

SCENES = SynthScenes(10, 32, seed=5)[:]
MASKED = SynthScenes(10, 32, seed=5, task="segmentation")[:]
LABELLED = [(s.vi, s.mask) for s in MASKED]


def fusion(folder: Path) -> dict:
    "Two stages: the paper's loss, then TarDAL's, with two discriminators, an optimiser of their own, random numbers and crops."
    torch.manual_seed(0)
    net = FusionNet()
    paper = caf_recipe(LossSpace("paper"), torch.full((15,), 1 / 15), FusionSettings(epochs=2, batch_size=4, lr=1e-3))
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
    adversarial = find_method("tardal").recipe[0]._replace(epochs=2, batch_size=4, crop=24, schedule=plateau)
    history = train_fusion(net, SCENES[:6], (paper, adversarial), seed=3, progress=False, folder=folder / "state", save_every=1)
    return {"losses": history.losses, "net": net.state_dict()}


def segmenter(folder: Path) -> dict:
    judge = Segmenter(MFNET_CLASSES)
    settings = SegmenterSettings(model="tiny", steps=12, batch_size=4, lr=1e-3, pretrained=False)
    result = finetune_segmenter(judge, LABELLED, LABELLED[:2], settings, folder / "out", seed=3, progress=False, folder=folder / "state", save_every=1)
    back = Segmenter(MFNET_CLASSES, weights=result.checkpoint)
    return {"losses": result.losses, "scores": [result.miou, result.macc], "net": back.net.state_dict()}


def joint(folder: Path) -> dict:
    torch.manual_seed(0)
    net, judge = FusionNet(), Segmenter(MFNET_CLASSES)
    history = train_joint(net, judge, LossSpace("paper"), torch.full((15,), 1 / 15), MASKED, FusionSettings(epochs=4, batch_size=4, lr=1e-3), seed=3, progress=False,
                          folder=folder / "state", save_every=1)
    return {"losses": history.losses, "net": net.state_dict(), "task": judge.net.state_dict()}


def searched(folder: Path) -> dict:
    "The bi-level optimisation, with a warm-up of both networks."
    torch.manual_seed(0)
    settings = SearchSettings(epochs=4, batch_size=2, lr_fusion=1e-3, warmup_task=2, warmup_fusion=2)
    result = search(FusionNet(), Segmenter(MFNET_CLASSES), LossSpace(RELEASED), MASKED[:6], MASKED[6:], settings, progress=False, folder=folder / "state")
    return {"losses": result.history.to_dict("records"), "alpha": result.alpha}


def detector(folder: Path) -> dict:
    "Mosaics are closed before the last two epochs, and the optimiser steps after every third batch, across the ends of epochs."
    settings = DetectorSettings(model="yolov5n", epochs=4, batch_size=5, nominal_batch=15, pretrained=False)
    result = finetune_detector(Detector(M3FD_CLASSES), folder.parent / "data", settings, 32, folder / "out", seed=3, device="cpu", progress=False,
                               folder=folder / "state", close_mosaic=2, warmup_epochs=1.0)
    back = Detector(M3FD_CLASSES, weights=result.checkpoint)
    return {"losses": result.losses, "scores": [result.map, result.map50], "net": back.net.state_dict()}


def stages(folder: Path) -> dict:
    "A training, its pictures and their metrics in one cache, where each waits for the one before."
    from caf_nb.config import DataSettings
    from caf_nb.losses import TERMS
    from caf_nb.stages import FuseDataset, MeasureFusion, TrainFusion, Weighted
    from caf_nb.stages.sources import Data
    infra, data = {"folder": folder / "cache"}, Data(name="m3fd", settings=DataSettings(source="embedded", size=32, train=4, val=1, test=2))
    trained = TrainFusion(data=data, loss=Weighted(beta=(1 / len(TERMS),) * len(TERMS)), settings=FusionSettings(epochs=2, batch_size=2, lr=1e-3), infra=infra)
    fused = FuseDataset(data=data, model=trained, infra=infra)
    found = MeasureFusion(fused=fused, metrics=("SD", "EN"), infra=infra).run()
    return {"losses": trained.run().losses, "found": found, "net": trained.run().state, "pictures": digests(fused.run())}


def fuse(folder: Path) -> dict:
    "A second run leaves the results that are there, so that half of one would stay."
    result = fuse_folder(load_fusion("caf", device="cpu"), folder.parent / "data/ir", folder.parent / "data/vi", folder / "out", progress=False, overwrite=False)
    return {"losses": [len(result.failures)], "pictures": digests(folder / "out")}


def report(folder: Path) -> dict:
    "Two notebooks, each with a table, and the page."
    from caf_nb.report import build_report
    page, ran = build_report("smoke", folder / "out", folder.parent / "data/nbs")
    return {"losses": [bool(r.error) for r in ran.values()], "tables": digests(folder / "out", "*.csv"), "page": page.is_file() and len(list((folder / "out/page/html").glob("table*.html")))}


def digests(folder: Path, which: str = "*.*") -> dict[str, str]: return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob(which)) if file.is_file()}


def write_pairs(root: Path) -> None:
    for scene in SynthScenes(8, (96, 128), seed=3):
        for kind in ("ir", "vi"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            write_png(root / kind / f"{scene.stem}.png", getattr(scene, kind))


def write_notebooks(root: Path) -> None:
    "Each says which process runs it."
    (root / "nbs").mkdir(parents=True)
    (root / "docs").symlink_to(Path(__file__).resolve().parents[1] / "docs")
    for name in ("table1", "table2"):
        said = f"import os, time; open({str(root / 'kernels')!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(0.5); open(f'{{out}}/{name}.csv', 'w').write('{name}' * 999)"
        cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"] * (not i)}, "source": source, "outputs": [], "execution_count": None} for i, source in enumerate(("profile = 'mini'; out = ''", said))]
        title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# About {name}"}
        kernel = {"name": "python3", "display_name": "python3", "language": "python"}
        (root / f"nbs/{name}.ipynb").write_text(json.dumps({"cells": [title, *cells], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))


def kernels_left(file: Path, seconds: float = 30) -> int:
    "How many kernels still run, after so many seconds at most."
    pids = file.read_text().split() if file.exists() else []
    for _ in range(int(10 * seconds)):
        if not (living := [pid for pid in pids if Path(f"/proc/{pid}").exists()]): return 0
        time.sleep(0.1)
    return len(living)


def child(train, folder: Path) -> int:
    "Start a run of a training in a fork; the result is written at its end."
    pid = os.fork()
    if pid: return pid
    try:
        torch.save(train(folder), folder / "result.new")
        (folder / "result.new").rename(folder / "result.pt")
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def computed(pid: int) -> float:
    "Seconds of computing so far; on a busy machine another clock would kill before anything has happened."
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def age(pid: int) -> float:
    "Seconds since a process began; a report computes in others."
    begun = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun / os.sysconf("SC_CLK_TCK")


def killed_after(pid: int, seconds: float, clock) -> bool:
    "Kill a process unless it ends before."
    while clock(pid) < seconds:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found and status: sys.exit("a run has failed")
        if found: return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return str(a) == str(b)  # nan is nan


RUNS = {"fusion": fusion, "segmenter": segmenter, "joint": joint, "search": searched, "detector": detector, "stages": stages, "fuse": fuse, "report": report}
LIFE = {"detector": (0.4, 1.2), "stages": (0.1, 0.9), "fuse": (0.1, 0.9), "report": (0.1, 0.9)}  # seconds to a kill, where the peaceful run has 1; half of the detector's goes by before its first epoch


def main(kind: str, root: Path, wanted: int) -> dict:
    train, draw, kills, trainings = RUNS[kind], random.Random(kind), 0, []
    import kornia.losses, kornia.metrics, torch._dynamo, torch._inductor  # noqa: F401  what a training imports late, no fork should
    if kind == "segmenter": import accelerate, torchmetrics.classification, transformers.models.segformer.modeling_segformer
    if kind == "fusion": import accelerate
    if kind in ("joint", "search"): import transformers.models.segformer.modeling_segformer
    if kind == "stages": import accelerate, caf_nb.stages  # noqa: F401
    if kind == "fuse": write_pairs(root / "data")
    if kind == "report":
        import caf_nb.report
        write_notebooks(root / "data")
    if kind == "detector":
        for split in ("train", "test"):
            write_yolo_folder(root / "data", split, [s.vi for s in SCENES], [s.boxes for s in SCENES], [s.stem for s in SCENES], M3FD_CLASSES)
        import polars  # noqa: F401
        with contained_ultralytics(): from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator  # noqa: F401
    begun = time.monotonic()
    (root / "whole").mkdir()
    _, status, used = os.wait4(child(train, root / "whole"), 0)
    if status: sys.exit("the first run has failed")
    clock = age if kind == "report" else computed
    seconds, whole = time.monotonic() - begun if kind == "report" else used.ru_utime + used.ru_stime, torch.load(root / "whole/result.pt")
    while kills < wanted:
        folder = root / f"training{len(trainings)}"
        folder.mkdir()
        runs = 0
        while not (folder / "result.pt").exists():
            runs += 1
            life = draw.uniform(*LIFE.get(kind, (0.05, 0.6))) if kills < 3 * wanted else 10.  # a training that never ends would be killed for ever
            kills += killed_after(child(train, folder), life * seconds, clock)
            if kernels_left(root / "data/kernels"): sys.exit("a kernel is left")
        trainings.append((runs, same(torch.load(folder / "result.pt"), whole)))
    return {"kills": kills, "trainings": trainings, "seconds": seconds, "steps": len(whole["losses"]), "all_s": time.monotonic() - begun}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
