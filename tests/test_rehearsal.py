"""A rehearsal for CUDA without a card: steps on PyTorch's fake tensors, which have shapes and devices but no values.

An operation on tensors of two devices raises there, as it does on a card. The tests at the end take single transfers out and see it raise:
without `.to(self.where)` in the batches of a search, without `device=self.where` of its last hypergradient, and without `.to(engine.where)` in a
step of the fusion network it was "Expected all tensors to be on the same device" or "Unhandled FakeTensor Device Propagation ... found two
different devices meta, cpu"; likewise for joint training, the segmenter's trainer, the detector's boxes, and `fuse`.

The loss of ultralytics and the counts of torchmetrics have sizes that depend on values, which fake tensors do not have: stand-ins take their
place, and what this library hands them is rehearsed. The estimate of a run's hours counts pictures and touches no tensor."""

import inspect
import textwrap
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from caf_nb import loop, search
from caf_nb import fusion as fusing_module
from caf_nb.config import FusionSettings, SearchSettings, SegmenterSettings
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, collate, luma, recolor
from caf_nb.fusion import FusionNet
from caf_nb.losses import LossSpace
from caf_nb.metrics import measure
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter, detector
from caf_nb.train import caf_recipe, fusion, joint, segmenter, train_fusion, train_joint

SCENES = SynthScenes(2, 32, seed=5, task="segmentation")[:]
CARD = "meta"  # stands for the card: PyTorch's backward pass over fake CUDA tensors asks for a driver
BETA = torch.full((15,), 1 / 15)


def filled(tensor: torch.Tensor):
    "Values for a tensor that has none: 1, and of a list zeros, which are positions of the first scene."
    if not tensor.ndim: return 1.0 if tensor.dtype.is_floating_point else 1
    return [filled(row) for row in tensor] if tensor.ndim > 1 else [0] * len(tensor)


@contextmanager
def rehearsal(monkeypatch):
    "Fake tensors; yields how often the processor waits for a value of the fake card, by the name of the method."
    waits: Counter[str] = Counter()

    def reading(name, value):
        def read(self, *_):
            waits[name] += self.device.type == CARD
            return value(self)
        monkeypatch.setattr(FakeTensor if name == "tolist" else torch.Tensor, name, read)  # a list is one transfer

    for name, value in {"item": filled, "tolist": filled, "__bool__": lambda t: True, "__float__": lambda t: 1.0, "__int__": lambda t: 1}.items():
        reading(name, value)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no type for this device
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield waits


def searching(net, judge, space, order="printed"):
    search.search(net, judge, space, SCENES, SCENES, SearchSettings(epochs=1, batch_size=2, order=order), progress=False)


def fusing(net, judge, space):
    train_fusion(net, SCENES, caf_recipe(space, BETA, FusionSettings(epochs=1, batch_size=2)), progress=False)


def joining(net, judge, space):
    train_joint(net, judge, space, BETA, SCENES, FusionSettings(epochs=1, batch_size=2), progress=False)


class Counts:
    "Stands for the metrics of torchmetrics: answers and masks meet."
    def __init__(self, *_): pass
    def to(self, where): return self
    def update(self, answers, masks): self.met = answers + masks
    def compute(self): return {"counts": torch.ones(9, 9), "iou": torch.ones(9), "acc": torch.ones(9)}


def finetuning(net, judge, space):
    "A step of the segmenter's trainer, and its evaluation."
    pairs = [(scene.vi, scene.mask) for scene in SCENES]
    settings = SegmenterSettings(model="tiny", steps=1, batch_size=2, recipe="plain", pretrained=False)
    segmenter._Training(judge, pairs, settings, 0, loop.Engine(torch.device(CARD))).step()
    segmenter.evaluate_segmenter(judge, pairs)


def detecting(net, judge, space):
    "A step of a detector whose loss is that of ultralytics up to its values."
    batch = collate(SynthScenes(2, 32, seed=5)[:])
    images = recolor(batch.ir, batch.vi).to(CARD)
    DETECTOR[0].loss(images, batch.boxes).backward()


def painting(net, judge, space):
    "Pictures come from the processor, and go back to it; their metrics are computed on either."
    scene = SCENES[0]
    fused = fusing_module.fuse(net, scene.ir, luma(scene.vi))
    assert fused.device.type == "cpu"
    for name in ("SD", "SCD", "AG"): measure(name, *(x.to(CARD) for x in (fused, scene.ir, luma(scene.vi))))


DETECTOR = []
STEPS = {"search": searching, "search, beta first": partial(searching, order="beta_first"), "fusion": fusing, "joint": joining,
         "segmenter": finetuning, "detector": detecting, "fuse": painting}


MOST = {"search": 24, "search, beta first": 24, "fuse": 11}  # reads of a value of the card in one step, those of the metrics included


def moved(module, *_, **__):
    "A module whose parameters are on the card, with its buffers."
    for part in module.modules():
        part._buffers.update({name: b.to(CARD) for name, b in part._buffers.items() if b is not None and b.device.type != CARD})
    return module


def rehearse(name, monkeypatch):
    "One step, with all networks on the fake card."
    modules = FusionNet(), Segmenter(MFNET_CLASSES), LossSpace("paper", "slim")
    DETECTOR[:] = [Detector(M3FD_CLASSES)] if name == "detector" else []
    monkeypatch.setattr(segmenter, "_segmentation_metrics", Counts)
    with rehearsal(monkeypatch) as waits:
        for module in (*modules, *DETECTOR): module.to(CARD)
        for one in DETECTOR:
            one.net.loss = lambda batch: (one.net(batch["img"])["feats"][0].flatten()[:1] * torch.cat([batch["cls"], batch["bboxes"]], 1).flatten(), None)
        monkeypatch.setattr(torch.nn.Module, "to", moved)  # fake parameters cannot be swapped again
        STEPS[name](*modules)
    return waits


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_a_card(name, monkeypatch):
    waits = rehearse(name, monkeypatch)
    assert waits.total() <= MOST.get(name, 4), waits  # labels known, loss finite, gradient finite, loss


def without(monkeypatch, owner, name, transfer, instead=""):
    "Take a transfer to the card out of the source of a function."
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(transfer) == 1
    found = {}
    exec(source.replace(transfer, instead), function.__globals__, found)
    monkeypatch.setattr(owner, name, found[name])


@pytest.mark.parametrize("name, owner, function, transfer, instead", [
    ("search", search._Players, "batch", ".to(self.where)", ""),
    ("search", search._Players, "__init__", ", device=self.where", ""),
    ("fusion", fusion, "_step", ".to(engine.where)", ""),
    ("joint", joint._Joint, "step", ".to(self.where)", ""),
    ("segmenter", segmenter, "_stacked", "torch.stack(masks).to(where)", "torch.stack(masks)"),
    ("detector", detector, "yolo_batch", "t.to(images.device, torch.float32)", "t.to(torch.float32)"),
    ("fuse", fusing_module, "fuse", "image.to(like)", "image"),
])  # fmt: skip
def test_a_transfer_that_is_missing_is_found(name, owner, function, transfer, instead, monkeypatch):
    without(monkeypatch, owner, function, transfer, instead)
    with pytest.raises(RuntimeError, match="same device|different devices"): rehearse(name, monkeypatch)
