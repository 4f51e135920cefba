"""Run by test_training.py in a process of its own: trainings that are killed with SIGKILL and resumed.

    python killed.py KIND FOLDER KILLS

One process imports the libraries and makes the data; each run of a training is a fork of it, which saves the seconds of importing. (The parent never computes, so that
no thread is lost in the fork.) The training is run once in peace, then again and again with kills at random moments until it has ended, and that until there were KILLS
kills. What is printed, as JSON, is for the test to judge."""

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
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES
from caf_nb.fusion import FusionNet
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
    "The bi-level optimisation, with a warm-up of the task network."
    torch.manual_seed(0)
    settings = SearchSettings(epochs=4, batch_size=2, lr_fusion=1e-3, warmup_task=3)
    result = search(FusionNet(), Segmenter(MFNET_CLASSES), LossSpace(RELEASED), MASKED[:6], MASKED[6:], settings, progress=False, folder=folder / "state")
    return {"losses": result.history.to_dict("records"), "alpha": result.alpha}


def detector(folder: Path) -> dict:
    "Mosaics are closed before the last two epochs, and the optimiser steps after every third batch, across the ends of epochs."
    settings = DetectorSettings(model="yolov5n", epochs=4, batch_size=5, nominal_batch=15, pretrained=False)
    result = finetune_detector(Detector(M3FD_CLASSES), folder.parent / "data", settings, 32, folder / "out", seed=3, device="cpu", progress=False,
                               folder=folder / "state", close_mosaic=2, warmup_epochs=1.0)
    back = Detector(M3FD_CLASSES, weights=result.checkpoint)
    return {"losses": result.losses, "scores": [result.map, result.map50], "net": back.net.state_dict()}


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


def killed_after(pid: int, seconds: float) -> bool:
    "Kill a process unless it ends before."
    while computed(pid) < seconds:
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


LIFE = {"fusion": (0.05, 0.6), "segmenter": (0.05, 0.6), "joint": (0.05, 0.6), "search": (0.05, 0.6), "detector": (0.4, 1.2)}  # seconds to a kill, where the peaceful run has 1; half of the detector's goes by before its first epoch


def main(kind: str, root: Path, wanted: int) -> dict:
    train, draw, kills, trainings = {"fusion": fusion, "segmenter": segmenter, "joint": joint, "search": searched, "detector": detector}[kind], random.Random(kind), 0, []
    import kornia.losses, kornia.metrics, torch._dynamo, torch._inductor  # noqa: F401  what a training imports late, no fork should
    if kind == "segmenter": import accelerate, torchmetrics.classification, transformers.models.segformer.modeling_segformer
    if kind == "fusion": import accelerate
    if kind in ("joint", "search"): import transformers.models.segformer.modeling_segformer
    if kind == "detector":
        for split in ("train", "test"):
            write_yolo_folder(root / "data", split, [s.vi for s in SCENES], [s.boxes for s in SCENES], [s.stem for s in SCENES], M3FD_CLASSES)
        import polars  # noqa: F401
        with contained_ultralytics(): from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator  # noqa: F401
    begun = time.monotonic()
    (root / "whole").mkdir()
    _, status, used = os.wait4(child(train, root / "whole"), 0)
    if status: sys.exit("the first run has failed")
    seconds, whole = used.ru_utime + used.ru_stime, torch.load(root / "whole/result.pt")
    while kills < wanted:
        folder = root / f"training{len(trainings)}"
        folder.mkdir()
        runs = 0
        while not (folder / "result.pt").exists():
            runs += 1
            life = draw.uniform(*LIFE[kind]) if kills < 3 * wanted else 10.  # a training that never ends would be killed for ever
            kills += killed_after(child(train, folder), life * seconds)
        trainings.append((runs, same(torch.load(folder / "result.pt"), whole)))
    return {"kills": kills, "trainings": trainings, "seconds": seconds, "steps": len(whole["losses"]), "all_s": time.monotonic() - begun}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
