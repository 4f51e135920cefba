"""Inputs that people have stumbled over: each is read right, or refused in one sentence. The files are made here; where the reference data is present, the same kinds
are made by its own script as well. (What was taken out to see a test fail stands in its docstring.)"""

import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import SHARED
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from caf_nb.checkpoints import read_tensors
from caf_nb.cli import fuse_app
from caf_nb.config import FusionSettings, SegmenterSettings
from caf_nb.core import CafError
from caf_nb.data import check, image_size, load_dataset, prepare, read_image, read_pair
from caf_nb.data.archives import _judge
from caf_nb.data.sets import where
from caf_nb.fusion import Source, fuse_folder, load_fusion
from caf_nb.report import listed, output_folder
from caf_nb.rows import Setup
from caf_nb.stages.sources import fingerprint
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter
from caf_nb.train import evaluate_detector, finetune_detector, finetune_segmenter, train_fusion
from caf_nb.zoo import Objective, Recipe, build_network, find_method

pytestmark = [pytest.mark.disable_socket, pytest.mark.filterwarnings("ignore::UserWarning")]
CLASSES = ("person", "car")


def save(path: Path, array, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path, **options)


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def pictures(root: Path) -> None:
    "Turned, inverted, counted, paged and coloured pictures beside the two that they should give."
    ir = (np.add.outer(np.arange(64) // 2, np.arange(96)) + 40).astype(np.uint8)
    ir[10:20, 60:80] = 240
    vi = np.dstack([ir.T.reshape(ir.shape), 255 - ir, ir[::-1]]) // 2 + np.uint8(30)
    save(root / "truth/ir.png", ir)
    save(root / "truth/vi.png", vi)
    smooth = np.dstack([ir[::-1], 255 - ir, np.full_like(ir, 90)])
    save(root / "truth/vi.png", smooth)
    for tag, stored in {3: smooth[::-1, ::-1], 6: np.rot90(smooth), 8: np.rot90(smooth, -1)}.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        save(root / f"exif/vi_{tag}.jpg", stored, exif=exif, quality=98)
        save(root / f"exif/vi_{tag}.png", stored, exif=exif)
    (root / "tiff").mkdir()
    tifffile.imwrite(root / "tiff/miniswhite16.tif", np.uint16(65535) - ir * np.uint16(257), photometric="miniswhite")
    tifffile.imwrite(root / "tiff/counts14.tif", (7000 + ir / 255 * 2500).astype(np.uint16))
    tifffile.imwrite(root / "tiff/five_pages.tif", np.stack([np.roll(ir, 5 * k, 1) for k in range(5)]), photometric="minisblack")
    tifffile.imwrite(root / "tiff/half.tif", (ir / 255).astype(np.float16))
    broken = (ir / 255).astype(np.float32)
    broken[3, 4] = np.nan
    tifffile.imwrite(root / "tiff/nan.tif", broken)
    save(root / "content/jet_ir.png", np.dstack([ir, 255 - ir, 128 - ir // 2]))
    save(root / "content/mfnet_four.png", np.dstack([smooth, ir]))
    for kind, image in (("ir", ir), ("vi", smooth)):
        save(root / "names" / kind / "plain.png", image)
        content = (root / "names" / kind / "plain.png").read_bytes()
        with open(os.fsencode(root / "names" / kind) + b"/caf\xe9.png", "wb") as file: file.write(content)


VOC = ('<?xml version="1.0" encoding="{}"?><annotation><size><width>96</width><height>64</height></size><object><name>People</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>'
       '<xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>')
GOOD = VOC.format("UTF-8", 20, 10, 60, 50)


def archives(root: Path) -> None:
    "Small copies of M3FD with one kind of label each."
    kinds = {"swapped_corners": VOC.format("UTF-8", 60, 50, 20, 10), "sizes_differ": GOOD, "empty_size": GOOD.replace("<size><width>96</width><height>64</height></size>", "<size/>"),
             "utf16": VOC.format("UTF-16", 20, 10, 60, 50).encode("utf-16"), "latin1": VOC.format("ISO-8859-1", 20, 10, 60, 50).replace("People<", "People<!-- \u00e9 --><").encode("latin-1"),
             "yolo_in_pixels": "0 32 36 32 36\n", "classes_txt": "0 0.5 0.5 0.3 0.4\n"}
    for name, label in kinds.items():
        for k in range(10):
            draw, shape = np.random.default_rng(k), (128, 192) if name == "sizes_differ" else (64, 96)
            save(root / f"archives/{name}/Ir/{k:05d}.png", draw.integers(0, 255, (64, 96), "uint8"))
            save(root / f"archives/{name}/Vis/{k:05d}.png", draw.integers(0, 255, (*shape, 3), "uint8"))
            write(root / f"archives/{name}/" / (f"labels/{k:05d}.txt" if str(label)[0] == "0" else f"Annotation/{k:05d}.xml"), label)
    write(root / "archives/classes_txt/labels/classes.txt", "People\nCar\nBus\nLamp\nMotorcycle\nTruck\n")


def detectors(root: Path) -> None:
    "YOLO folders with one odd label in the training part."
    for name, odd in {"six_columns": "0 .5 .5 .3 .4 .9\n", "negative_width": "0 .5 .5 -.3 .4\n", "bom": "\ufeff0 .5 .5 .3 .4\r\n", "float_class": "0.0 .5 .5 .3 .4\n"}.items():
        for part in ("train", "val", "test"):
            for k in range(4):
                save(root / f"detector/{name}/images/{part}/{k}.png", np.random.default_rng(k).integers(0, 255, (64, 96, 3), "uint8"))
                write(root / f"detector/{name}/labels/{part}/{k}.txt", odd if (part, k) == ("train", 1) else "0 .5 .5 .3 .4\n")
        write(root / f"detector/{name}/data.yaml", "train: images/train\nval: images/val\ntest: images/test\nnames: [person, car]\n")


@pytest.fixture(scope="module", params=["ours", pytest.param("theirs", marks=pytest.mark.shared)])
def cases(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "ours":
        for make in (pictures, archives, detectors): make(root)
    else:
        script = SHARED / "cases/make_cases.py"
        if not script.is_file(): pytest.skip(f"no reference data: {script} is absent")
        argv, sys.argv = sys.argv, [str(script), str(root)]
        try: runpy.run_path(str(script))
        finally: sys.argv = argv
    return root


def told(call, *args, **options) -> tuple[object, list[str]]:
    "What a call gives, and its warnings."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = call(*args, **options)
    return found, [str(w.message) for w in seen]


# Pictures


@pytest.mark.parametrize("tag", [3, 6, 8])
def test_exif(cases, tag, tmp_path):
    "Taken out: `_upright`. Then 3 was upside down without a word, and 6 and 8 had another size than the truth."
    truth = read_image(cases / "truth/vi.png")
    for form, most in (("png", 0), ("jpg", 2)):
        file = cases / f"exif/vi_{tag}.{form}"
        assert image_size(file) == (96, 64) and read_image(file).shape == truth.shape
        assert 255 * (read_image(file) - truth).abs().mean() <= most


def test_tiffs(cases):
    "Taken out: the photometric tag in `_decode_tiff`. Then white was black."
    truth = read_image(cases / "truth/ir.png")
    assert torch.equal(read_image(cases / "tiff/miniswhite16.tif"), truth)
    assert (read_image(cases / "tiff/half.tif") - truth).abs().max() < 1e-3
    with pytest.raises(CafError, match=r"nan\.tif: holds pixels that are no numbers"): read_image(cases / "tiff/nan.tif")
    found, warned = told(read_image, cases / "tiff/five_pages.tif")
    assert torch.equal(found, truth) and len(warned) == 1 and "it has 5 pages, and the first is read" in warned[0]


def test_counts_of_a_camera(cases, tmp_path):
    "One range for a folder. Taken out: `levels` in `read_pair`. Then the picture had the levels 27 to 37."
    truth, file = read_image(cases / "truth/ir.png"), cases / "tiff/counts14.tif"
    _, warned = told(read_pair, file, cases / "truth/vi.png")
    assert len(warned) == 1 and "of 65535 only; --ir-range percentile" in warned[0]
    for kind in ("ir", "vi"): (tmp_path / kind).mkdir()
    for name, offset in (("a", 0), ("b", 500)):
        tifffile.imwrite(tmp_path / f"ir/{name}.tif", tifffile.imread(file) + np.uint16(offset))
        (tmp_path / f"vi/{name}.png").write_bytes((cases / "truth/vi.png").read_bytes())
    means = {}
    for given in ("full", "percentile", "7000,9500"):
        run = CliRunner().invoke(fuse_app, ["--ir", str(tmp_path / "ir"), "--vi", str(tmp_path / "vi"), "--out", str(tmp_path / given), "--method", "ir", "--gray", "--ir-range", given])
        assert run.exit_code == 0, run.stderr
        a, b = (read_image(tmp_path / given / f"{name}.png")[:1] for name in "ab")
        means[given] = (a - truth).abs().mean()
        assert b.mean() > a.mean()  # what is warmer stays brighter
    assert means["full"] > 0.25 and means["percentile"] < 0.25 and means["7000,9500"] < 0.004
    with pytest.raises(CafError, match="the infrared range is '5'"): fuse_folder(Source("ir"), tmp_path / "ir", tmp_path / "vi", tmp_path / "out", ir_range="5")


def test_what_is_no_infrared_picture(cases, tmp_path):
    "Taken out: `_read_ir` and `_split_four`. Then there was no word, and the visible picture was fused with itself."
    _, warned = told(read_pair, cases / "content/jet_ir.png", cases / "truth/vi.png")
    assert len(warned) == 1 and "the channels of the infrared picture differ" in warned[0]
    four = cases / "content/mfnet_four.png"
    (ir, vi), warned = told(read_pair, four, four)
    assert torch.equal(ir, read_image(cases / "truth/ir.png")) and torch.equal(vi, read_image(cases / "truth/vi.png"))
    assert len(warned) == 1 and "its fourth channel is taken as infrared" in warned[0]


def test_a_name_that_is_no_text(cases, tmp_path):
    "OpenCV's imread ends the process with a segmentation fault here."
    result = fuse_folder(Source("mean"), cases / "names/ir", cases / "names/vi", tmp_path / "out", progress=False)
    assert len(result.done) == 2 and not result.failures and len(os.listdir(os.fsencode(tmp_path / "out"))) == 2


def test_a_terminal_without_the_letters(cases, tmp_path, monkeypatch):
    "Taken out: `reconfigure` in `_errors_as_text`. Then a UnicodeEncodeError ended the command after its work."
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252"))
    fuse_app(["--ir", str(cases / "truth/ir.png"), "--vi", str(cases / "truth/vi.png"), "--out", str(tmp_path / "\u878d\u5408/a.png"), "--method", "mean"], standalone_mode=False)
    sys.stdout.flush()
    assert b"1 of 1 pairs fused" in raw.getvalue() and b"\\u878d" in raw.getvalue()


# Labels: one judge


@pytest.mark.parametrize("name, kind", [("swapped_corners", "empty box"), ("sizes_differ", "size differs"), ("yolo_in_pixels", "outside")])
def test_what_check_calls_wrong_is_never_written(cases, tmp_path, name, kind):
    "Taken out: `_judge` in `prepare`. Then labels that were empty or wrong were written, exit code 0."
    root, names = cases / "archives" / name, ("People", "Car", "Bus", "Lamp", "Motorcycle", "Truck")
    report = check("m3fd", root, names=names, progress=False)
    assert not report.ok and kind in {f.kind for f in report.findings}
    for leave_out in (False, True):
        with pytest.raises(CafError, match=rf"has 10 wrong of 10 pairs, such as .*{kind}"):
            prepare("m3fd", root, tmp_path / "out", n=4, size=32, names=names, progress=False, leave_out=leave_out)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CafError, match=r"00000\.(xml|txt|png): "): load_dataset("m3fd", root, names=names)[0]


def test_what_is_wrong_is_left_out_on_request(tmp_path):
    archives(tmp_path)
    root = tmp_path / "archives/latin1"
    write(root / "Annotation/00003.xml", VOC.format("UTF-8", 60, 50, 20, 10))
    with pytest.raises(CafError, match="has 1 wrong of 10 pairs.*--leave-out"): prepare("m3fd", root, tmp_path / "out", n=4, size=32, progress=False)
    made = prepare("m3fd", root, tmp_path / "out", ratio=(1, 1, 0), n=4, size=32, progress=False, leave_out=True)
    assert made.left_out == 1 and sum(made.parts.values()) == 9 and not list((tmp_path / "out").rglob("*00003*"))
    published = where("m3fd")(root)
    assert _judge(published, True, False) == 1 and len(published) == 9


@pytest.mark.parametrize("name", ["utf16", "latin1", "empty_size", "classes_txt"])
def test_labels_that_are_right(cases, tmp_path, name):
    "Taken out: the encoding that XML declares. Then utf16 and latin1 were no text."
    root = cases / "archives" / name
    report = check("m3fd", root, progress=False)
    assert report.ok and report.pairs == 10 and report.findings == [] and report.classes["People"] == 10
    kind, *box = load_dataset("m3fd", root)[0].boxes[0].tolist()
    expected = [0.5, 0.5, 0.3, 0.4] if name == "classes_txt" else [40 / 96, 30 / 64, 40 / 96, 40 / 64]
    assert kind == 0 and box == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name, sentence", [("six_columns", "1.txt: line 1 is not `class cx cy w h`"), ("negative_width", "1.txt: has a box that is wrong .empty box"),
                                            ("float_class", "1.txt: line 1 is not .* the class '0.0' is no whole number")])
def test_labels_of_a_detector(cases, tmp_path, name, sentence):
    "Taken out: `box_fault`. Then the training with a negative width began."
    with pytest.raises(CafError, match=sentence):
        finetune_detector(Detector(CLASSES), cases / "detector" / name, None, 64, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CafError, match=sentence): evaluate_detector(Detector(CLASSES), cases / "detector" / name, 64, split="train")


def test_a_mark_before_a_label_is_read(cases):
    assert 0 <= evaluate_detector(Detector(CLASSES), cases / "detector/bom", 64, split="train").map <= 1


def test_masks(tmp_path):
    "Taken out: `_check_classes`. Then a RuntimeError came after the training."
    judge, image = Segmenter(CLASSES), torch.rand(3, 32, 32)
    settings = SegmenterSettings(model="tiny", steps=2, batch_size=1, lr=1e-4, pretrained=False)
    good, foreign, empty = (torch.full((32, 32), value) for value in (1, 7, 255))
    with pytest.raises(CafError, match="a mask of the test split has the class 7, and there are 2"):
        finetune_segmenter(judge, [(image, good)], [(image, foreign)], settings, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    loss = judge.loss(image[None], empty[None])
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in judge.parameters())


def test_a_picture_of_the_same_size_is_noticed(tmp_path):
    "Taken out: the content in `file_mark`. Then the fingerprint stayed."
    archives(tmp_path)
    root = tmp_path / "archives/latin1"
    for file in sorted((root / "Ir").iterdir()): Image.open(file).save(file.with_suffix(".bmp")), file.unlink()
    prepare("m3fd", root, tmp_path / "out", ratio=(1, 1, 0), n=4, size=32, progress=False)
    before, file = fingerprint(where("m3fd")(root)), root / "Ir/00004.bmp"
    size = file.stat().st_size
    save(file, 255 - np.array(Image.open(file)))
    assert file.stat().st_size == size and fingerprint(where("m3fd")(root)) != before
    prepare("m3fd", root, tmp_path / "out", ratio=(1, 1, 0), n=4, size=32, progress=False)
    assert next((tmp_path / "out").rglob("ir/images/*/00004.bmp")).read_bytes() == file.read_bytes()


def test_turned_and_deep_pictures_are_copied_upright(tmp_path):
    "Taken out: `_copy`, with the file itself in its place. Then the copy was turned, and its labels were not."
    archives(tmp_path)
    root = tmp_path / "archives/latin1"
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = np.array(Image.open(root / "Vis/00002.png"))
    save(root / "Vis/00002.png", np.rot90(whole), exif=exif)
    tifffile.imwrite(root / "Ir/00002.tif", 65535 - np.array(Image.open(root / "Ir/00002.png")).astype(np.uint16) * 257, photometric="miniswhite")
    (root / "Ir/00002.png").rename(tmp_path / "ir.png")
    prepare("m3fd", root, tmp_path / "out", ratio=(1, 1, 0), n=4, size=32, progress=False)
    assert (np.array(Image.open(next((tmp_path / "out").rglob("vi/images/*/00002.png")))) == whole).all()
    assert (np.array(Image.open(next((tmp_path / "out").rglob("ir/images/*/00002.png")))) == np.array(Image.open(tmp_path / "ir.png"))).all()


# Trainings, weights, parameters


class Mean(Objective):
    def forward(self, net, ir, vi): return net(torch.cat([ir, vi], 1)).mean()


def test_crops_are_cut_before_they_are_stacked():
    "Taken out: `_crops`, with `_cropped` of the whole batch in its place. Then scenes of three sizes were refused, whatever the crop."
    scenes = [SynthScenes(1, size, seed=1)[0] for size in ((32, 48), (40, 36), (64, 64))]
    recipe = Recipe(Mean, lambda parameters: torch.optim.SGD(parameters, 1e-3), 1, 3, crop=24)
    assert len(train_fusion(nn.Conv2d(2, 1, 1), scenes, recipe, progress=False).losses) == 1
    for crop, cause in ((None, "different sizes"), (60, "smaller than the crop")):
        with pytest.raises(CafError, match=cause): train_fusion(nn.Conv2d(2, 1, 1), scenes, recipe._replace(crop=crop), progress=False)


@pytest.mark.parametrize("method", ["didfuse", "umfusion", "reconet"])
def test_weights_of_several_cards(tmp_path, method):
    "Taken out: `module.` in `read_tensors`. Then all tensors were missing."
    net = build_network(method)
    names = {f"module.{name}": t for name, t in net.state_dict().items()}
    torch.save(names, tmp_path / "a.pth")
    assert read_tensors(tmp_path / "a.pth").keys() == net.state_dict().keys()
    loaded = load_fusion(method, tmp_path / "a.pth", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))


def test_parameters_of_a_notebook(tmp_path, monkeypatch):
    "As papermill hands them over."
    from caf_nb.config import Profile
    monkeypatch.chdir(tmp_path)
    assert Setup(profile=Profile.named("smoke"), data_root=2024, fused_root=None).data_root == "2024"
    with pytest.raises(CafError, match="2024: there is no such folder"): Setup(profile=Profile.named("smoke"), data_root=2024).data("m3fd")
    assert listed(None, ("ir",)) == ["ir"] and listed(2024) == ["2024"] and output_folder(2024, Profile.named("smoke")) == tmp_path / "2024"
