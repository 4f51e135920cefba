"""Make the detector and the segmenter of caf_nb/weights, from which profile smoke continues.

Both are trained from random weights on 1500 synthetic scenes of seeds that no table has, each shown as infrared, visible or mean image in turn, and kept in
half precision. The JSON file beside each says how it was made and how it scores on 96 other scenes.
Run from the root of the project: .venv/bin/python tools/starts.py     (about an hour on two quiet cores)
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from caf_nb.checkpoints import checksums
from caf_nb.config import DetectorSettings, SegmenterSettings
from caf_nb.core import environment
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, MULTISPECTRAL_CLASSES
from caf_nb.stages import source_in_turn
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter
from caf_nb.train import finetune_detector, finetune_segmenter, write_yolo_folder

WEIGHTS, OUT = Path("caf_nb/weights"), Path("out/starts").resolve()
SCENES, SIZE = {"train": 1500, "test": 96}, 96
SEEDS = {"detection": {"train": 9000, "test": 9002}, "segmentation": {"train": 9006, "test": 9008}}
CLASSES = (*M3FD_CLASSES, *(name for name in MULTISPECTRAL_CLASSES if name not in ("Person", "Car")))


def note(weights: Path, **about: object) -> None:
    "Write checksums and provenance of a checkpoint."
    about = {"sha256": checksums(weights, WEIGHTS)} | about | {"scenes": f"synthetic, {SCENES['train']} of {SIZE} pixels", "seeds": SEEDS, "environment": environment()}
    weights.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def detection_scenes(split: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    "Stem, image and boxes of the classes of both detection sets; an object that both label is kept once."
    n, seed = SCENES[split], SEEDS["detection"][split]
    pairs = zip(SynthScenes(n, SIZE, seed, "detection"), SynthScenes(n, SIZE, seed, "multispectral"))
    for ours, others in pairs:
        known = {tuple(row[1:]) for row in ours.boxes.tolist()}
        more = [[CLASSES.index(MULTISPECTRAL_CLASSES[int(row[0])]), *row[1:]] for row in others.boxes.tolist() if tuple(row[1:]) not in known]
        yield ours.stem, source_in_turn("", "", ours), torch.cat([ours.boxes, torch.tensor(more).reshape(-1, 5)])


def detector() -> None:
    "YOLOv5n with the classes of M3FD and Multispectral; Person has the weights of People, which means the same."
    for split in SCENES:
        stems, images, boxes = zip(*detection_scenes(split))
        write_yolo_folder(OUT / "boxes", split, images, boxes, stems, CLASSES)
    settings = DetectorSettings(model="yolov5n", epochs=24, batch_size=16, nominal_batch=16, pretrained=False, recipe="auto")
    net = Detector(CLASSES, settings.model)
    found = finetune_detector(net, OUT / "boxes", settings, SIZE, OUT / "detector", folder=OUT / "state")
    head = [name for name in net.net.state_dict() if ".cv3." in name and len(net.net.state_dict()[name]) == len(CLASSES)]
    state = {name: t[[*range(len(CLASSES)), 0]] if name in head else t for name, t in net.net.state_dict().items()}
    halved = {f"model.{name}": (t.half() if t.is_floating_point() else t).contiguous() for name, t in state.items()}
    names = {f"model.names.{i}": name for i, name in enumerate((*CLASSES, "Person"))}
    save_file(halved, WEIGHTS / "yolov5n.safetensors", {"format": "pt", **names})
    note(WEIGHTS / "yolov5n.safetensors", settings=settings.model_dump(), scores={"mAP@.5": found.map50, "mAP@.5:.95": found.map, **found.ap})


def segmenter() -> None:
    "The tiny SegFormer with the classes of MFNet."
    pairs = {split: [(source_in_turn("", "", s).expand(3, -1, -1) / 255, s.mask) for s in SynthScenes(n, SIZE, SEEDS["segmentation"][split], "segmentation")]
             for split, n in SCENES.items()}
    settings = SegmenterSettings(model="tiny", steps=3000, batch_size=16, lr=1e-3, pretrained=False)
    net = Segmenter(MFNET_CLASSES, settings.model)
    found = finetune_segmenter(net, pairs["train"], pairs["test"], settings, OUT / "segmenter", folder=OUT / "state")
    net.net.half()
    net.save(WEIGHTS / "segformer-tiny")
    note(WEIGHTS / "segformer-tiny", settings=settings.model_dump(), scores={"mIoU": found.miou, **found.iou})


if __name__ == "__main__":
    detector()
    segmenter()
