"""The task networks and their training, as a user of the library meets them."""

import hashlib
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from caf_nb.core import CafError
from caf_nb.config import DetectorSettings, Profile, SegmenterSettings
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, read_image, to_uint8
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter, Task, contained_ultralytics
from caf_nb.tasks.anchors import _by_name
from caf_nb.tasks.detector import read_network
from caf_nb.train import evaluate_detector, evaluate_segmenter, finetune_detector, finetune_segmenter, write_yolo_folder

SIZE = 64
BOXES = torch.tensor([[0, 0.5, 0.5, 0.8, 0.8], [1, 0.25, 0.25, 0.5, 0.5], [2, 0.75, 0.7, 0.4, 0.5]])


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(M3FD_CLASSES).eval()


@pytest.fixture(scope="module")
def yolo_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("vi")
    for seed, split in enumerate(("train", "test")):
        scenes = list(SynthScenes(8, SIZE, seed=seed))
        write_yolo_folder(root, split, [s.vi for s in scenes], [s.boxes for s in scenes], [s.stem for s in scenes], M3FD_CLASSES)
    return root


# The loss of a task


@pytest.mark.parametrize("h, w", [(64, 64), (50, 70)])
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_reaches_every_image(h, w, training):
    images = noise(2, 3, h, w).requires_grad_()
    mask = torch.randint(0, 9, (2, h, w), generator=torch.Generator().manual_seed(0))
    for task, targets in ((Detector(M3FD_CLASSES), [BOXES, BOXES[:1]]), (Segmenter(MFNET_CLASSES), mask)):
        assert isinstance(task, Task)
        loss = task.train(training).loss(images, targets)
        (gradient,) = torch.autograd.grad(loss, images)
        assert loss.ndim == 0 and gradient.isfinite().all()
        assert (gradient.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_does_not_grow_with_the_batch(training):
    image, mask = noise(1, 3, SIZE, SIZE), torch.randint(0, 9, (1, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    detector = Detector(M3FD_CLASSES).train(training)
    losses = [detector.loss(image.repeat(n, 1, 1, 1), [BOXES] * n).item() for n in (2, 4, 8)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # from the batch on in which the scores sum up to 1
    segmenter = Segmenter(MFNET_CLASSES).eval()
    losses = [segmenter.loss(image.repeat(n, 1, 1, 1), mask.repeat(n, 1, 1)).item() for n in (1, 2, 5)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_padding_by_the_detector_equals_padding_by_hand(detector):
    image = noise(1, 3, 48, 64)
    padded = torch.full((1, 3, 64, 64), 114 / 255)
    padded[..., :48, :] = image
    scaled = BOXES * torch.tensor([1, 1, 0.75, 1, 0.75])
    assert detector.loss(image, [BOXES]).item() == pytest.approx(detector.loss(padded, [scaled]).item(), rel=1e-6)


def test_an_image_without_objects_has_a_loss(detector):
    loss = detector.loss(noise(2, 3, SIZE, SIZE), [torch.empty(0, 5)] * 2)
    assert loss.isfinite() and loss > 0


def test_a_step_on_the_loss_lowers_it():
    mask = SynthScenes(1, SIZE, task="segmentation")[0].mask[None]
    for task, targets in ((Detector(M3FD_CLASSES), [BOXES]), (Segmenter(MFNET_CLASSES), mask)):
        image, optimizer = noise(1, 3, SIZE, SIZE), torch.optim.Adam(task.parameters(), 1e-3)
        losses = []
        for _ in range(4):
            losses.append(task.loss(image, targets))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]


def test_random_weights_belong_to_their_seed():
    def first(task):
        return next(task.parameters()).detach().clone()

    for build, classes in ((Detector, M3FD_CLASSES), (Segmenter, MFNET_CLASSES)):
        torch.manual_seed(3)
        one = first(build(classes, seed=1))
        torch.manual_seed(4)
        assert torch.equal(first(build(classes, seed=1)), one)
        assert not torch.equal(first(build(classes, seed=2)), one)


# Bad input


@pytest.mark.parametrize(
    "call, cause",
    [
        (lambda d: d.loss(noise(1, 1, 64, 64), [BOXES]), "instead of (B,3,H,W)"),
        (lambda d: d.loss(noise(1, 3, 64, 64), [BOXES] * 2), "1 images, but 2 targets"),
        (lambda d: d.loss(noise(1, 3, 64, 64), [BOXES[:, :4]]), "instead of (n,5)"),
        (lambda d: d.loss(noise(1, 3, 64, 64), [BOXES + 6]), "class index 6"),
        (lambda d: Detector(M3FD_CLASSES, "yolov99"), "there is no detector 'yolov99'"),
        (lambda d: Detector(M3FD_CLASSES, weights="absent.pt"), "absent.pt: there is no such file"),
        (lambda d: Segmenter(MFNET_CLASSES, "b7"), "there is no segmenter 'b7'"),
        (lambda d: Segmenter(MFNET_CLASSES, weights="absent"), "absent: is no folder of weights"),
    ],
)
def test_bad_input_is_named(detector, call, cause):
    with pytest.raises(CafError, match=r"\.$") as caught:
        call(detector)
    assert cause in str(caught.value) and caught.value.remedy


class Payload:
    def __reduce__(self):
        return (os.putenv, ("CAF_NB_TEST_PWNED", "1"))


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CafError, match="everything else in the pickle is refused"):
        Detector(M3FD_CLASSES, weights=tmp_path / "evil.pt")


# Folders


def test_a_yolo_folder_holds_what_was_written(tmp_path):
    scenes = list(SynthScenes(4, SIZE))
    data = write_yolo_folder(tmp_path, "train", [s.vi for s in scenes], [s.boxes for s in scenes], [s.stem for s in scenes], M3FD_CLASSES)
    assert data.read_text().splitlines()[-1] == 'names: ["People", "Car", "Bus", "Lamp", "Motorcycle", "Truck"]'
    for scene in scenes:
        assert torch.equal(read_image(tmp_path / f"images/train/{scene.stem}.png"), to_uint8(scene.vi) / 255)
        lines = (tmp_path / f"labels/train/{scene.stem}.txt").read_text().splitlines()
        assert all(line.split()[0].isdecimal() for line in lines)
        rows = torch.tensor([[float(v) for v in line.split()] for line in lines]).reshape(-1, 5)
        assert torch.allclose(rows, scene.boxes, atol=1e-6)


def test_new_labels_of_the_same_length_are_noticed(tmp_path, detector):
    image = torch.zeros(3, SIZE, SIZE)
    for label, expected in ((0, "People"), (1, "Car")):
        rows = torch.tensor([[label, 0.5, 0.5, 0.5, 0.5]])
        for split in ("train", "test"):
            write_yolo_folder(tmp_path, split, [image], [rows], ["a"], M3FD_CLASSES)
        scores = evaluate_detector(detector, tmp_path, SIZE, device="cpu")
        assert [name for name, value in scores.ap.items() if not math.isnan(value)] == [expected]


def test_without_val_the_test_split_is_not_used_for_selection(yolo_folder):
    assert "val: images/train" in (yolo_folder / "data.yaml").read_text()


# Scores


class FindsRectangles(nn.Module):
    "A perfect network for images that are black but for one bright red (class 0) or green (class 2) rectangle."

    names, stride = dict(enumerate(M3FD_CLASSES)), torch.tensor([8.0, 16.0, 32.0])

    def forward(self, images):
        found = images.new_zeros(len(images), 4 + len(self.names), 1)
        for row, image in zip(found, images):
            ys, xs = torch.where(image.amax(0) > 0.9)
            x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
            row[:4, 0] = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            row[4 + (0 if image[0].max() > 0.9 else 2)] = 1
        return found


def test_perfect_boxes_score_one(tmp_path, detector, monkeypatch):
    images, boxes = [], []
    for i, (channel, label) in enumerate([(0, 0), (1, 2), (0, 0), (1, 2)]):
        image = torch.zeros(3, 48, 64)
        image[channel, 8 : 24 + 4 * i, 16:48] = 1
        images.append(image)
        boxes.append(torch.tensor([[label, 0.5, (32 + 4 * i) / 2 / 48, 0.5, (16 + 4 * i) / 48]]))
    data = write_yolo_folder(tmp_path, "test", images, boxes, list("abcd"), M3FD_CLASSES)
    monkeypatch.setitem(detector._modules, "net", FindsRectangles())
    scores = evaluate_detector(detector, data, 64, device="cpu")
    assert scores.map == pytest.approx(0.995) and scores.map50 == pytest.approx(0.995)  # the curve of ultralytics ends at 0.995
    assert {c for c, v in scores.ap.items() if not math.isnan(v)} == {"People", "Bus"}


def test_perfect_masks_score_one_and_absent_classes_are_nan():
    class Oracle(Segmenter):
        def predict(self, images):
            return answers.pop(0)[None]

    masks = [torch.zeros(32, 32, dtype=torch.long), torch.ones(32, 32, dtype=torch.long)]
    answers = list(masks)
    pairs = [(torch.zeros(3, 32, 32), mask) for mask in masks]
    scores = evaluate_segmenter(Oracle(MFNET_CLASSES), pairs, batch_size=1)
    assert scores.miou == scores.macc == 1
    assert {c for c, v in scores.iou.items() if not math.isnan(v)} == {"unlabelled", "car"}


# Training


def process_state() -> tuple:
    return (
        dict(os.environ), random.getstate(), tuple(np.random.get_state()[1]), torch.get_rng_state().tolist(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.save, str(np.get_printoptions()), os.getcwd(),
        len(torch.serialization.get_safe_globals()),
    )  # fmt: skip


def test_finetuning_depends_on_its_seed_alone_and_leaves_the_process_alone(yolo_folder, tmp_path):
    def run(name, seed):
        detector = Detector(M3FD_CLASSES)
        settings = DetectorSettings(model="yolov5n", epochs=1, batch_size=4, nominal_batch=4, pretrained=False)
        return finetune_detector(detector, yolo_folder, settings, SIZE, tmp_path / name, seed=seed, device="cpu", progress=False)

    before = process_state()
    first = run("a", 0)
    assert process_state() == before
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    second = run("b", 0)
    assert second.losses == first.losses and str(second.ap) == str(first.ap)
    weights = [Detector(M3FD_CLASSES, weights=r.checkpoint).net.state_dict() for r in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))
    assert run("c", 1).losses != first.losses


def test_the_detector_takes_over_what_the_checkpoint_holds(yolo_folder, tmp_path):
    detector = Detector(M3FD_CLASSES)
    start = next(detector.parameters()).detach().clone()
    settings = DetectorSettings(model="yolov5n", epochs=1, batch_size=4, nominal_batch=4, pretrained=False)
    result = finetune_detector(detector, yolo_folder, settings, SIZE, tmp_path / "run", device="cpu", select_best=True, progress=False)
    assert not torch.equal(next(detector.parameters()), start)
    back = Detector(M3FD_CLASSES, weights=result.checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(back.net.state_dict().values(), detector.net.state_dict().values()))
    assert result.checkpoint.name == "best.pt" and "random (seed 0), 1 epochs" in result.provenance


@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda root: [p.write_text("") for p in (root / "labels/train").iterdir()], "no image of split train has a box"),
        (lambda root: [p.unlink() for p in (root / "labels/train").iterdir()], "the images have no labels"),
        (lambda root: (root / "labels/test/a.txt").write_text("6 0.5 0.5 0.1 0.1"), "class index 6"),
        (lambda root: (root / "data.yaml").unlink(), "there is no such file"),
        (lambda root: (root / "data.yaml").write_text("train: images/train\nnames: [Car]"), "lists the classes Car"),
    ],
)
def test_unusable_folders_are_named_before_training(tmp_path, detector, change, cause):
    for split in ("train", "test"):
        write_yolo_folder(tmp_path, split, [noise(3, SIZE, SIZE)], [BOXES], ["a"], M3FD_CLASSES)
    change(tmp_path)
    with pytest.raises(CafError, match=cause) as caught:
        finetune_detector(detector, tmp_path, Profile.named("smoke").detector, SIZE, tmp_path / "run", device="cpu", progress=False)
    assert caught.value.file is not None and caught.value.remedy


def test_a_segmenter_learns_and_depends_on_its_seed_alone(tmp_path):
    scenes = SynthScenes(8, SIZE, task="segmentation")
    pairs = [(s.vi, s.mask) for s in scenes]
    settings = SegmenterSettings(model="tiny", steps=20, batch_size=4, lr=1e-3, pretrained=False)

    def run(name):
        segmenter = Segmenter(MFNET_CLASSES)
        return finetune_segmenter(segmenter, pairs, pairs, settings, tmp_path / name, progress=False)

    before = process_state()
    first = run("a")
    assert process_state() == before
    torch.manual_seed(99)
    assert run("b").losses == first.losses
    assert first.losses[-1] < 0.8 * first.losses[0]
    assert first.iou["unlabelled"] > 0.7  # which is what twenty steps suffice for


def test_ultralytics_stays_in_its_room():
    before = process_state()
    with contained_ultralytics():
        import ultralytics

        ultralytics.utils.torch_utils.init_seeds(5, deterministic=True)
    assert process_state() == before


# Published starts


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    "A file that ultralytics writes at the end of a training on the 80 classes of COCO, in half precision."
    import yaml

    from caf_nb.tasks.detector import _detection_network

    file = tmp_path_factory.mktemp("coco") / "yolov5nu.pt"
    with contained_ultralytics():
        import ultralytics
        from ultralytics.utils.torch_utils import strip_optimizer

        names = yaml.safe_load((Path(ultralytics.__file__).parent / "cfg/datasets/coco.yaml").read_text())["names"]
        net = _detection_network("yolov5n", tuple(names.values()), seed=5)
        torch.save({"epoch": 3, "best_fitness": None, "model": None, "ema": net, "optimizer": {"state": {}}, "train_args": {"imgsz": 640}}, file)
        strip_optimizer(file)
    return file, net.half().float(), list(names.values())


def test_a_detector_starts_from_coco(coco, tmp_path):
    file, theirs, names = coco
    torch.manual_seed(1)
    start = Detector(M3FD_CLASSES, weights=file)
    assert start.provenance == f"yolov5nu.pt (SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}; 80 classes; no People, Lamp in it, seed 0)"
    body = {name: t for name, t in theirs.state_dict().items() if not name.startswith("model.24.cv3.")}
    own = start.net.state_dict()
    assert len(body) > 300 and all(torch.equal(own[name], t) for name, t in body.items())
    for ours, rows in zip(start.net.model[-1].cv3, theirs.model[-1].cv3):
        for name in ("Car", "Bus", "Motorcycle", "Truck"):
            assert torch.equal(ours[-1].weight[M3FD_CLASSES.index(name)], rows[-1].weight[names.index(name.lower())])
    torch.manual_seed(2)
    assert same(Detector(M3FD_CLASSES, weights=file), start) and not same(Detector(M3FD_CLASSES, weights=file, seed=1), start)
    assert start.loss(noise(1, 3, SIZE, SIZE), [BOXES]).isfinite()

    torch.save({"model": start.net}, tmp_path / "again.pt")  # the head is as wide as that of COCO, and comes back so
    again = Detector(M3FD_CLASSES, weights=tmp_path / "again.pt")
    assert again.provenance.startswith("again.pt (SHA-256 ") and again.provenance.endswith("; 6 classes)") and same(again, start)


def test_a_broken_file_in_the_current_folder_is_neither_deleted_nor_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yolov5nu.pt").write_bytes(b"broken")
    with pytest.raises(CafError, match="is no checkpoint"):
        Detector(M3FD_CLASSES, weights="yolov5nu.pt")
    assert (tmp_path / "yolov5nu.pt").read_bytes() == b"broken"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_segmenter_starts_from_an_imagenet_encoder(tmp_path, pickled, half):
    import transformers

    from caf_nb.tasks import SEGMENTERS

    encoder = transformers.SegformerForImageClassification(transformers.SegformerConfig(num_labels=1000, **SEGMENTERS["b0"]))
    encoder = encoder.half() if half else encoder
    encoder.save_pretrained(tmp_path / "mit-b0")
    if pickled:  # as the hub has it
        (tmp_path / "mit-b0/model.safetensors").unlink()
        torch.save(encoder.state_dict(), tmp_path / "mit-b0/pytorch_model.bin")
    torch.manual_seed(1)
    start = Segmenter(MFNET_CLASSES, "b0", weights=tmp_path / "mit-b0")
    assert start.provenance == "mit-b0 (ImageNet, by its name; encoder only; decoder random, seed 0)"
    theirs = encoder.float().segformer.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in start.net.segformer.state_dict().items())
    assert {p.dtype for p in start.parameters()} == {torch.float32}
    torch.manual_seed(2)
    assert same(Segmenter(MFNET_CLASSES, "b0", weights=tmp_path / "mit-b0"), start)
    assert not same(Segmenter(MFNET_CLASSES, "b0", weights=tmp_path / "mit-b0", seed=1), start)
    with pytest.raises(CafError, match="cannot be loaded into SegFormer b1"):
        Segmenter(MFNET_CLASSES, "b1", weights=tmp_path / "mit-b0")


def test_a_segmenter_starts_from_one_for_other_classes(tmp_path):
    "All but its last layer comes along."
    theirs = Segmenter(("road", "car", "sky"), seed=3)
    theirs.save(tmp_path / "three")
    start = Segmenter(MFNET_CLASSES, weights=tmp_path / "three")
    assert start.provenance == "three (3 classes; classifier random, seed 0)"
    ours, theirs = start.net.state_dict(), theirs.net.state_dict()
    head = {f"decode_head.classifier.{kind}" for kind in ("weight", "bias")}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - head) and all(len(ours[name]) == len(MFNET_CLASSES) for name in head)
    assert same(Segmenter(MFNET_CLASSES, weights=tmp_path / "three"), start)
    assert start.loss(noise(1, 3, SIZE, SIZE), torch.full((1, SIZE, SIZE), len(MFNET_CLASSES) - 1)).isfinite()


@pytest.mark.shared
def test_a_file_of_the_original_brings_backbone_and_neck(shared):
    "Published as COCO weights, but its two classes are kinds of waste: the provenance must not say COCO."
    file = shared / "weights/tasks/yolov5n.pt"
    start, random = Detector(M3FD_CLASSES, weights=file), Detector(M3FD_CLASSES).net.state_dict()
    assert start.provenance == "yolov5n.pt (a YOLOv5n of the original repository for two kinds of waste, not COCO's; 2 classes; backbone and neck of the original, 342 of 427 tensors; head random, seed 0)"
    theirs, names = read_network(file)
    assert names == ["Biodegradable", "Non-biodegradable"]
    body = {name for name in random if not name.startswith("model.24.")}
    state = start.net.state_dict()
    assert len(body) == 342 and all(torch.equal(state[name], theirs[name].to(state[name])) for name in body)
    assert all(torch.equal(state[name], random[name]) for name in random.keys() - body)
    assert start.loss(noise(1, 3, SIZE, SIZE), [BOXES]).isfinite()
    with pytest.raises(CafError, match="another network than yolov5s"):
        Detector(M3FD_CLASSES, "yolov5s", weights=file)


def test_the_head_by_name():
    "Three anchors of box (4), objectness and classes; here (a, b), there (b, c, a)."
    ours, theirs = torch.zeros(3 * 7, 2), torch.arange(1.0, 25)[:, None].expand(24, 2)
    found = _by_name(ours, theirs, [(0, 2), (1, 0)]).unflatten(0, (3, 7))[..., 0]
    assert found.tolist() == [[8 * a + row for row in (1, 2, 3, 4, 5, 8, 6)] for a in range(3)]


# The original YOLOv5, where it is installed


@pytest.fixture(scope="module")
def original():
    pytest.importorskip("yolov5", reason='optional: pip install --no-deps yolov5 "setuptools<81"')
    from caf_nb.tasks import AnchorDetector

    return AnchorDetector


def test_the_original_stays_in_its_room():
    pytest.importorskip("yolov5", reason='optional: pip install --no-deps yolov5 "setuptools<81"')
    code = """
import logging, os, sys, pathlib, matplotlib, pandas as pd, numpy as np, torch
def state():
    return (dict(os.environ), list(sys.path), matplotlib.get_backend(), dict(matplotlib.rcParams), pd.get_option("display.max_columns"), str(np.get_printoptions()),
            str(torch._tensor_str.PRINT_OPTS), torch.get_num_threads(), torch.get_rng_state().tolist(), logging.getLogger().level)
import caf_nb.tasks.anchors
before = state()
detector = caf_nb.tasks.anchors.AnchorDetector(("a", "b"))
after = state()
assert after == before, [i for i, (a, b) in enumerate(zip(after, before)) if a != b]
assert not [p for p in pathlib.Path.home().rglob("*") if "ltralytics" in p.name]
"""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HOME": home}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("training", [True, False])
def test_the_original_is_a_task(original, training):
    detector = original(M3FD_CLASSES).train(training)
    assert isinstance(detector, Task)
    images = noise(2, 3, 50, 70).requires_grad_()
    loss = detector.loss(images, [BOXES, BOXES[:1]])
    (gradient,) = torch.autograd.grad(loss, images)
    assert loss.ndim == 0 and gradient.isfinite().all() and (gradient.flatten(1).abs().sum(1) > 0).all()
    assert detector.loss(images, [BOXES[:0]] * 2).isfinite()
    losses = [detector.eval().loss(images[:1].repeat(n, 1, 1, 1), [BOXES] * n).item() for n in (1, 2, 4)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_original_loss_is_what_the_formula_says(original):
    "No object: only objectness is left, 4, 1 and 0.4 times the mean cross-entropy of the three maps, and it grows with the square of the size."
    detector, image = original(M3FD_CLASSES).eval(), noise(1, 3, SIZE, SIZE)
    with torch.no_grad():
        maps = detector.net(image)[1]
        parts = [torch.nn.functional.softplus(m[..., 4]).mean().item() for m in maps]
        expected = (SIZE / 640) ** 2 * sum(w * part for w, part in zip((4, 1, 0.4), parts))
        assert detector.loss(image, [BOXES[:0]]).item() == pytest.approx(expected, rel=1e-5)


def test_a_step_on_the_original_loss_lowers_it(original):
    task, image, losses = original(M3FD_CLASSES), noise(1, 3, SIZE, SIZE), []
    optimizer = torch.optim.Adam(task.parameters(), 1e-3)
    for _ in range(4):
        losses.append(task.loss(image, [BOXES]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_boxes_of_the_original_are_those_of_its_own_program(original):
    "Its non-maximum suppression on its answer, and that of ultralytics on ours."
    from caf_nb.report import detect
    from yolov5.utils.general import non_max_suppression

    detector, images = original(M3FD_CLASSES, seed=3).eval(), noise(2, 3, SIZE, SIZE)
    with torch.no_grad():
        for conv in detector.net.model[-1].m:  # somebody is sure of something
            torch.nn.init.normal_(conv.weight, std=0.1, generator=torch.Generator().manual_seed(1)), torch.nn.init.zeros_(conv.bias)
        theirs = non_max_suppression(detector.net(images)[0], 0.1, 0.6)
        ours = detect(detector, images, 0.1, 0.6)
    for found, rows in zip(ours, theirs):
        rows[:, :4] = rows[:, :4].clamp(0, SIZE)
        assert len(rows) == len(found.labels) > 10
        mine = torch.cat([found.corners, found.scores[:, None], torch.tensor([[M3FD_CLASSES.index(name)] for name in found.labels])], 1)
        assert torch.allclose(*(torch.tensor(sorted(x.round(decimals=3).tolist())) for x in (mine, rows)), atol=2e-3)


def test_the_original_is_trained_and_scored_like_the_other(original, tmp_path):
    "From the search to a score by one field of the settings; a second start from the checkpoint scores the same."
    from caf_nb.config import DataSettings, SearchSettings
    from caf_nb.stages import Data, FinetuneDetector, FuseDataset, Method, Search

    settings = DetectorSettings(model="yolov5n", epochs=2, batch_size=4, nominal_batch=4, pretrained=False, anchors=True)
    infra = {"folder": str(tmp_path)}
    data = Data.of("m3fd", DataSettings(source="embedded", size=32, train=4, val=2, test=2))
    found = Search(data=data, settings=SearchSettings(epochs=1, batch_size=2), detector=settings, infra=infra)
    assert "yolov5n from random (seed 0)" in found.provenance()["task network of the search"]
    stage = FinetuneDetector(fused=FuseDataset(data=data, model=Method(method="mean"), infra=infra), settings=settings, infra=infra)
    result, network = stage.run(), stage.trained()
    assert isinstance(network, original) and len(result.losses) == 2 and len(stage.scores()) == len(M3FD_CLASSES) + 2
    assert evaluate_detector(network, stage.fused.run(), 32).map == result.map
    assert not same(network, original(M3FD_CLASSES))
    assert settings.model_copy(update={"anchors": False})._exca_uid_dict_override().keys() == settings._exca_uid_dict_override().keys() - {"anchors"}


def test_the_original_is_trained_jointly(original):
    "With the fusion network, on the sum of both losses; every tensor of both moves."
    from caf_nb.config import FusionSettings
    from caf_nb.fusion import FusionNet
    from caf_nb.losses import LossSpace
    from caf_nb.train import train_joint

    torch.manual_seed(0)
    net, task, scenes = FusionNet(), original(M3FD_CLASSES), SynthScenes(4, 64, seed=5)[:]
    before = [p.detach().clone() for part in (net, task) for p in part.parameters()]
    settings = FusionSettings(epochs=3, batch_size=4, lr=1e-3)
    losses = train_joint(net, task, LossSpace("paper", "slim"), torch.full((15,), 1 / 15), scenes, settings, lr_task=1e-3, progress=False).losses
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, [p for part in (net, task) for p in part.parameters()], strict=True))


def test_weights_of_the_original(original, tmp_path):
    theirs = original((*(f"class {i}" for i in range(79)), "car"), seed=5)
    torch.save({"epoch": -1, "best_fitness": np.array([0.5]), "model": theirs.net.half(), "ema": None, "optimizer": None, "date": "2022-01-01"},
               tmp_path / "yolov5n.pt")  # fmt: skip
    theirs.net.float()
    torch.manual_seed(1)
    start = original(M3FD_CLASSES, weights=tmp_path / "yolov5n.pt")
    digest = hashlib.sha256((tmp_path / "yolov5n.pt").read_bytes()).hexdigest()[:12]
    assert start.provenance == f"yolov5n.pt (SHA-256 {digest}; 80 classes; no People, Bus, Lamp, Motorcycle, Truck in it, seed 0)"
    head = {name for name in start.net.state_dict() if name.startswith("model.24.m.")}
    own, random = start.net.state_dict(), original(M3FD_CLASSES).net.state_dict()
    assert len(head) == 6 and all(torch.equal(own[name], t) for name, t in theirs.net.state_dict().items() if name not in head)
    for name in head:
        new, old, drawn = (state[name].unflatten(0, (3, -1)) for state in (own, theirs.net.state_dict(), random))
        assert torch.equal(new[:, :5], old[:, :5]) and torch.equal(new[:, 6], old[:, -1]) and torch.equal(new[:, 7:], drawn[:, 7:])
    torch.manual_seed(2)
    assert same(original(M3FD_CLASSES, weights=tmp_path / "yolov5n.pt"), start)

    torch.save({"ema": start.net, "model": None}, tmp_path / "mine.pt")
    again = original(M3FD_CLASSES, weights=tmp_path / "mine.pt")
    assert again.provenance.startswith("mine.pt (SHA-256") and same(again, start)
    with pytest.raises(CafError, match="holds another network than yolov5s"):
        original(M3FD_CLASSES, "yolov5s", weights=tmp_path / "mine.pt")
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CafError, match="everything else in the pickle is refused"):
        original(M3FD_CLASSES, weights=tmp_path / "evil.pt")


def test_pillow_opens_pictures_as_before():
    "ultralytics replaces PIL.Image.open when it is imported; its own one fails on a text file that is called .png for want of another package."
    code = 'from PIL import Image\nbefore = Image.open\nfrom caf_nb.tasks import Detector\nDetector(["a"])\nassert Image.open is before'
    subprocess.run([sys.executable, "-c", code], check=True)
