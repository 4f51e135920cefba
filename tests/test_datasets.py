"""The published data sets: readers on trees in their authors' layouts, planted defects, the split, and `caf-data` from outside."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import caf_nb.data
from caf_nb.data import Blocks, Checked, blocks, check, deal, find_scenes, make_split, prepare, read_blocks
from caf_nb.cli import data_app
from caf_nb.core import CafError
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, MULTISPECTRAL_CLASSES, PairFolder, collate, read_pair
from caf_nb.data import DISJOINT, M3FD, MSRS, NOTES, READERS, MFNet, Multispectral, RoadScene, Split, load_dataset, read_split, write_split
from caf_nb.synth import SynthScenes
from published import N, SIZE, TREES, gray, rgb, save, voc, write


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    "One clean tree of each set; copy it before changing it."
    base = tmp_path_factory.mktemp("published")
    for name, build in TREES.items(): build(base / name)
    published.m3fd_yolo(base / "m3fd_yolo")
    return base


@pytest.fixture
def tree(trees, tmp_path):
    "A function that gives a copy of one tree."
    def copy(name): return Path(shutil.copytree(trees / name, tmp_path / name))
    return copy


def found(report: Checked, root: Path) -> set[tuple[str, str]]:
    "(kind, file) of all that is wrong."
    return {(f.kind, str(f.file.relative_to(root))) for f in report.findings if f.kind not in NOTES}


def quiet(name: str, root: Path, **options) -> Checked:
    return check(name, root, progress=False, **options)


# ---------------------------------------------------------------- readers

def test_names_of_the_design():
    for name in ("M3FD", "MFNet", "Multispectral", "TNO", "RoadScene", "MSRS"): assert getattr(caf_nb.data, name) is READERS[name.lower()]


@pytest.mark.parametrize("name", TREES)
def test_every_reader_gives_every_pair(trees, name):
    scenes = load_dataset(name, trees / name)
    drawn = SynthScenes(N, SIZE, seed=5, task="segmentation")
    lossy = 12 if name == "roadscene" else 1  # gray levels; JPEG
    assert len(scenes) == (6 if name == "msrs" else N)  # its part detection is no part of all
    for scene in scenes:
        assert scene.ir.shape == (1, *SIZE) and scene.vi.shape == (3, *SIZE) and scene.mask.shape == SIZE and scene.boxes.shape[1:] == (5,)
        assert min((scene.ir - d.ir)[..., 6:].abs().mean() for d in drawn) < lossy / 255  # a black border of six was planted
    assert torch.equal(pickle.loads(pickle.dumps(scenes))[0].ir, scenes[0].ir)  # workers of a DataLoader get copies
    assert collate(scenes[:2]).vi.shape == (2, 3, *SIZE)
    assert scenes[-1].stem == scenes.items[-1].stem
    with pytest.raises(IndexError): scenes[len(scenes)]


def test_m3fd_boxes_by_name(trees):
    drawn = SynthScenes(N, SIZE, seed=5)
    for source in ("m3fd", "m3fd_yolo"):
        for scene, truth in zip(M3FD(trees / source), drawn, strict=True):
            assert torch.equal(scene.boxes[:, 0], truth.boxes[:, 0])
            assert (scene.boxes - truth.boxes).abs().max() <= 1 / min(SIZE)
            assert (scene.vi - truth.vi).abs().max() < 1 / 255


def test_integer_labels_without_names_are_refused(tree):
    root = tree("m3fd_yolo")
    (root / "classes.txt").unlink()
    with pytest.raises(CafError, match="nothing says what the numbers mean"): M3FD(root)[0]
    assert torch.equal(M3FD(root, names=("people", "car", "bus", "motorcycle", "lamp", "truck"))[0].boxes[:, 0], M3FD(tree("m3fd"))[0].boxes[:, 0])
    write(root / "data.yaml", "train: x\nnames: [people, car, bus, motorcycle, lamp, truck]\n")
    assert M3FD(root).names == ("people", "car", "bus", "motorcycle", "lamp", "truck")


@pytest.mark.parametrize("names", [("Ir", "Vis", "Annotation"), ("ir", "vi", "annotations"), ("IR", "VIS", "ANNOTATION"), ("infrared", "visible", "Annotations")])
@pytest.mark.parametrize("above", ["", "M3FD_Detection", "M3FD/M3FD_Detection"])
def test_folder_names_in_the_wild(tmp_path, names, above):
    published.m3fd(tmp_path / above, *names)
    assert len(M3FD(tmp_path)) == N and len(M3FD(tmp_path)[0].boxes)


def test_m3fd_fusion_archive_has_no_boxes(tmp_path):
    published.m3fd(tmp_path, labels="")
    assert [len(s.boxes) for s in M3FD(tmp_path)] == [0] * N and quiet("m3fd", tmp_path).ok


def test_a_class_that_the_set_does_not_have_stops_the_reader(tree):
    root = tree("m3fd")
    write(root / "Annotation/00000.xml", voc([("Pedestrian2", 1, 1, 5, 5)]))
    with pytest.raises(CafError, match="'Pedestrian2', which m3fd does not have"): M3FD(root)[0]


def test_boxes_beyond_the_border_are_refused(tree):
    root = tree("m3fd")
    write(root / "Annotation/00000.xml", voc([("Car", -6, 12, 6.4, 60), ("Car", 70, 1, 80, 9)]))
    with pytest.raises(CafError, match=r"00000\.xml: is wrong \(outside: Car -6,12 to 6,60 in 64x48\)"): M3FD(root)[0]


def test_mfnet_parts_masks_and_the_fourth_channel(trees):
    drawn = {s.stem: s for s in SynthScenes(N, SIZE, seed=5, task="segmentation")}
    for part, n in {"all": 8, "train": 4, "val": 2, "test": 2, "test_day": 1, "test_night": 1}.items():
        scenes = MFNet(trees / "mfnet", part)
        assert len(scenes) == n
        for scene in scenes:
            assert torch.equal(scene.mask, drawn[scene.stem].mask)
            assert (scene.ir - drawn[scene.stem].ir).abs().max() < 1 / 255 and (scene.vi - drawn[scene.stem].vi).abs().max() < 1 / 255
    with pytest.raises(CafError, match="has no part 'dev'"): MFNet(trees / "mfnet", "dev")


def test_mfnet_flipped_copies_are_left_out(tree):
    root = tree("mfnet")
    for kind in ("images", "labels"): shutil.copy(root / kind / "00000D.png", root / kind / "00000D_flip.png")
    with open(root / "train.txt", "a") as file: file.write("00000D_flip\n")
    report = quiet("mfnet", root)
    assert report.ok and report.pairs == N and [f.kind for f in report.findings] == ["flipped copy"]


def test_multispectral_parts_classes_and_borders(trees):
    root = trees / "multispectral"
    assert [s.stem for s in Multispectral(root, "test")] == ["000001", "000003", "000005", "000007"]
    assert [s.stem for s in Multispectral(root, "train")] == ["000000", "000002", "000004", "000006"]
    drawn = SynthScenes(N, SIZE, seed=5, task="multispectral")
    for scene, truth in zip(Multispectral(root), drawn, strict=True): assert torch.equal(scene.boxes[:, 0], truth.boxes[:, 0])  # holes are left out
    report = quiet("multispectral", root)
    assert tuple(report.classes) == MULTISPECTRAL_CLASSES and [(f.kind, f.detail) for f in report.findings] == [("black border", "1 of 8 pairs")]


def test_tno_pairs_of_every_camera(trees):
    assert [item.stem for item in READERS["tno"](trees / "tno").items] == [
        "Athena_images-APC_2-view_1", "Athena_images-bunker", "Athena_images-lake", "DHV_images-wall", "FEL_images-Duine_sequence-7400",
        "FEL_images-Duine_sequence-7401", "Triclobs_images-Farm", "tank"]


def test_roadscene_takes_the_folders_that_match(trees):
    assert {(i.ir.parent.name, i.vi.parent.name) for i in RoadScene(trees / "roadscene").items} == {("cropinfrared", "crop_LR_visible")}


def test_msrs_parts(trees):
    drawn = {s.stem: s for s in SynthScenes(N, SIZE, seed=5, task="segmentation")}
    assert [len(MSRS(trees / "msrs", p)) for p in ("train", "test", "detection")] == [4, 2, 2]
    for scene in MSRS(trees / "msrs", "train"): assert torch.equal(scene.mask, drawn[scene.stem].mask)
    assert MSRS(trees / "msrs", "detection", names=("car", "person"))[0].boxes[:, 0].tolist() == [1, 0]


def test_boxes_of_a_folder_of_ones_own(tree, tmp_path):
    root = tree("m3fd_yolo")
    own, m3fd = load_dataset("folder", root), M3FD(root)
    assert own.classes == m3fd.names == ("people", "car", "bus", "motorcycle", "lamp", "truck")
    for scene, same in zip(own, m3fd, strict=True):
        assert [own.classes[int(k)] for k in scene.boxes[:, 0]] == [M3FD_CLASSES[int(k)].lower() for k in same.boxes[:, 0]]
    report = quiet("folder", root)
    assert report.ok and report.classes == {k.lower(): n for k, n in quiet("m3fd", root).classes.items()}
    made = prepare("folder", root, tmp_path / "out", ratio=(2, 1, 1), n=5, size=32, progress=False)
    assert sum(made.parts.values()) == N and set(made.parts) == set(DISJOINT) and '"motorcycle"' in made.yolo["ir"].read_text()
    (root / "classes.txt").unlink()
    assert [f.kind for f in quiet("folder", root).findings] == ["unnamed classes"]
    write(root / "data.yaml", "names: {0: dog}\n")
    assert {f.kind for f in quiet("folder", root).findings} == {"unknown class"}


def test_masks_of_a_folder_of_ones_own(tree):
    root = tree("msrs") / "train"
    with pytest.raises(CafError, match="nothing says what the numbers mean"): load_dataset("folder", root)[0]
    assert [f.kind for f in quiet("folder", root).findings if f.kind != "shifted"] == ["unnamed classes"]
    write(root / "data.yaml", f"names: [{', '.join(MFNET_CLASSES)}]\n")
    own, known = load_dataset("folder", root), MSRS(root.parent, "train")
    assert own.mask_classes == MFNET_CLASSES and all(torch.equal(a.mask, b.mask) for a, b in zip(own, known, strict=True))
    write(root / "data.yaml", "names: [road]\n")
    assert {f.kind for f in quiet("folder", root).findings} - {"shifted"} == {"unknown class"}
    for part in ("val", "test"): shutil.copytree(root, root.parent / part, dirs_exist_ok=True)
    assert [len(load_dataset("folder", root.parent, part)) for part in ("train", "val")] == [4, 4]
    assert {f.kind for f in load_dataset("folder", root.parent).findings} == {"split overlap"}


@pytest.mark.parametrize("name", TREES)
def test_another_layout_is_one_sentence(tmp_path, name):
    write(tmp_path / "sub/readme.txt", "")
    with pytest.raises(CafError, match=f"does not look like {name}.*caf-data where {name}"): load_dataset(name, tmp_path)
    with pytest.raises(CafError, match="cannot be listed"): load_dataset(name, tmp_path / "absent")


# ---------------------------------------------------------------- planted defects

def gone(*paths):
    def plant(root):
        for path in paths: (root / path).unlink()
    return plant


def text(path, content):
    def plant(root): write(root / path, content)
    return plant


def picture(path, make):
    def plant(root):
        pixels = make()
        (root / path).unlink(missing_ok=True)
        save(root / path, pixels)
    return plant


def cut(path, keep=0.6):
    def plant(root): (root / path).write_bytes((root / path).read_bytes()[:int((root / path).stat().st_size * keep)])
    return plant


def append(path, content):
    def plant(root): write(root / path, (root / path).read_text() + content)
    return plant


def a_bit_flipped(root):
    raw = bytearray((root / "Vis/00003.png").read_bytes())
    raw[len(raw) // 2] ^= 4
    (root / "Vis/00003.png").write_bytes(raw)


def a_folder_called_png(root): (root / "Vis/00003.png").unlink(); (root / "Vis/00003.png").mkdir()
def a_link_to_nowhere(root): (root / "Ir/00003.png").unlink(); (root / "Ir/00003.png").symlink_to("absent.png")
def a_bomb(root): published.bomb(root / "Ir/00003.png")
def the_visible_copied(root): shutil.copy(root / "Vis/00003.png", root / "Ir/00003.png")
def a_second_format(root): Image.open(root / "Vis/00003.png").save(root / "Vis/00003.jpg")
def lists_in_two(root):
    for kind in ("ir", "vi", "Segmentation_labels"): shutil.copy(root / f"train/{kind}/00000D.png", root / f"test/{kind}/00000D.png")


def alpha_opaque(root):
    four = np.array(Image.open(root / "images/00002D.png"))
    four[..., 3] = 255
    save(root / "images/00002D.png", four)


def thermal_lost(root): Image.open(root / "images/00002D.png").convert("RGB").save(root / "images/00002D.png")


def split_with(change):
    "A split file in the tree, with one line changed."
    def plant(root):
        parts = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
        lines = [f"{part} {i // 2} {i:05d}" for i, part in enumerate(parts)]
        write(root / "split/m3fd.txt", "# caf_nb split of m3fd, version 1: seed 0, ratio 2 1 1 (train val test)\n" + "\n".join(change(lines)) + "\n")
    return plant


XML, MASK = "Annotation/00003.xml", "labels/00002D.png"
DEFECTS = {  # what was done: (data set, how, what check must find)
    "infrared image gone": ("m3fd", gone("Ir/00003.png"), {("no partner", "Vis/00003.png")}),
    "visible image gone": ("m3fd", gone("Vis/00003.png"), {("no partner", "Ir/00003.png")}),
    "label gone": ("m3fd", gone(XML), {("no label", "Vis/00003.png")}),
    "pair gone, label left": ("m3fd", gone("Ir/00003.png", "Vis/00003.png"), {("no image", XML)}),
    "truncated PNG": ("m3fd", cut("Vis/00003.png"), {("unreadable", "Vis/00003.png")}),
    "PNG without its last bytes": ("m3fd", cut("Ir/00003.png", 0.995), {("unreadable", "Ir/00003.png")}),
    "one bit flipped": ("m3fd", a_bit_flipped, {("unreadable", "Vis/00003.png")}),
    "text that calls itself PNG": ("m3fd", text("Vis/00003.png", "not found"), {("unreadable", "Vis/00003.png")}),
    "empty file": ("m3fd", text("Ir/00003.png", ""), {("unreadable", "Ir/00003.png")}),
    "folder that calls itself PNG": ("m3fd", a_folder_called_png, {("unreadable", "Vis/00003.png")}),
    "link to nowhere": ("m3fd", a_link_to_nowhere, {("unreadable", "Ir/00003.png")}),
    "PNG that claims 3.6 gigapixels": ("m3fd", a_bomb, {("unreadable", "Ir/00003.png")}),
    "both unreadable": ("m3fd", lambda root: (cut("Vis/00003.png")(root), cut("Ir/00003.png")(root)), {("unreadable", "Vis/00003.png"), ("unreadable", "Ir/00003.png")}),
    "sizes differ": ("m3fd", picture("Ir/00003.png", lambda: rgb(torch.rand(1, 24, 32))), {("size differs", "Ir/00003.png")}),
    "visible image in both folders": ("m3fd", the_visible_copied, {("same picture", "Ir/00003.png")}),
    "infrared image black": ("m3fd", picture("Ir/00003.png", lambda: np.zeros((*SIZE, 3), np.uint8)), {("constant", "Ir/00003.png")}),
    "two files of one name": ("m3fd", a_second_format, {("two files", "Vis/00003.png")}),
    "XML cut short": ("m3fd", cut(XML), {("bad label", XML)}),
    "XML of another tool": ("m3fd", text(XML, "<annotation><object><name>Car</name></object></annotation>"), {("bad label", XML)}),
    "XML with nan": ("m3fd", text(XML, voc([("Car", 1, "nan", 5, 5)])), {("bad label", XML)}),
    "XML that unfolds": ("m3fd", text(XML, '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'), {("bad label", XML)}),
    "XML that is no text": ("m3fd", lambda root: (root / XML).write_bytes(bytes(range(256))), {("bad label", XML)}),
    "XML of 3 megabytes": ("m3fd", text(XML, "<annotation>" + " " * 3_000_000 + "</annotation>"), {("bad label", XML)}),
    "XML nested 100,000 deep": ("m3fd", text(XML, "<a>" * 100_000 + "</a>" * 100_000), set()),
    "label of another size": ("m3fd", text(XML, voc([("Car", 1, 1, 5, 5)], size=(1024, 768))), {("label size", XML)}),
    "unknown class": ("m3fd", text(XML, voc([("Dog", 1, 1, 5, 5), ("Car", 1, 1, 5, 5)])), {("unknown class", XML)}),
    "box beyond the right": ("m3fd", text(XML, voc([("Car", 50, 1, 65, 5)])), {("outside", XML)}),
    "box above the top": ("m3fd", text(XML, voc([("Car", 50, -1, 60, 5)])), {("outside", XML)}),
    "corners swapped": ("m3fd", text(XML, voc([("Car", 9, 1, 5, 5)])), {("empty box", XML)}),
    "box of no height": ("m3fd", text(XML, voc([("Car", 1, 5, 5, 5)])), {("empty box", XML)}),
    "stem in two parts": ("m3fd", split_with(lambda rows: rows + ["test 0 00000"]), {("split overlap", "Vis/00000.png"), ("scene torn", "split/m3fd.txt")}),
    "scene torn": ("m3fd", split_with(lambda rows: [rows[0].replace("train", "val"), *rows[1:]]), {("scene torn", "split/m3fd.txt")}),
    "split lists what is not there": ("m3fd", split_with(lambda rows: rows + ["test 9 77777"]), {("listed, absent", "split/m3fd.txt")}),
    "split forgets an image": ("m3fd", split_with(lambda rows: rows[:-1]), {("not listed", "Vis/00007.png")}),
    "split lists an image twice": ("m3fd", split_with(lambda rows: rows + rows[-1:]), {("listed twice", "split/m3fd.txt")}),
    "YOLO class beyond the list": ("m3fd_yolo", text("labels/00003.txt", "6 0.5 0.5 0.1 0.1\n"), {("unknown class", "labels/00003.txt")}),
    "YOLO row of four": ("m3fd_yolo", text("labels/00003.txt", "1 0.5 0.5 0.1\n"), {("bad label", "labels/00003.txt")}),
    "YOLO in pixels": ("m3fd_yolo", text("labels/00003.txt", "1 32 24 6 4\n"), {("outside", "labels/00003.txt")}),
    "thermal channel lost": ("mfnet", thermal_lost, {("no thermal", "images/00002D.png")}),
    "thermal channel opaque": ("mfnet", alpha_opaque, {("constant", "images/00002D.png")}),
    "mask beyond the classes": ("mfnet", picture(MASK, lambda: np.full(SIZE, 9, np.uint8)), {("unknown class", MASK)}),
    "mask coloured": ("mfnet", picture(MASK, lambda: np.zeros((*SIZE, 3), np.uint8)), {("bad label", MASK)}),
    "mask of another size": ("mfnet", picture(MASK, lambda: np.ones((24, 32), np.uint8)), {("label size", MASK)}),
    "mask cut short": ("mfnet", cut(MASK), {("unreadable", MASK)}),
    "mask gone": ("mfnet", gone(MASK), {("no label", "images/00002D.png")}),
    "mask without image": ("mfnet", picture("labels/00099D.png", lambda: np.ones(SIZE, np.uint8)), {("no image", "labels/00099D.png")}),
    "official list gone": ("mfnet", gone("val.txt"), {("no list", "val.txt"), ("not listed", "images/00004D.png"), ("not listed", "images/00005N.png")}),
    "test image in train": ("mfnet", append("train.txt", "00006D.png\n"), {("split overlap", "images/00006D.png")}),
    "listed, absent": ("mfnet", append("test.txt", "01234N\n"), {("listed, absent", "test.txt")}),
    "listed twice": ("mfnet", append("train.txt", "00000D\n"), {("listed twice", "train.txt")}),
    "not listed": ("mfnet", text("val.txt", "00004D\n"), {("not listed", "images/00005N.png")}),
    "vis_ok without image": ("multispectral", picture("vis_ok/000050.png", lambda: rgb(torch.rand(3, *SIZE))), {("listed, absent", "vis_ok")}),
    "warped image without label": ("multispectral", gone("Annotations_ConvertedSummarized/000002.xml"), {("no label", "ConvertedImages/rgb/000002.png")}),
    "warped image without partner": ("multispectral", gone("ConvertedImages/fir/000002.png"), {("no partner", "ConvertedImages/rgb/000002.png")}),
    "a ninth class": ("multispectral", text("Annotations_ConvertedSummarized/000002.xml", voc([("dog", 1, 1, 9, 9)])), {("unknown class", "Annotations_ConvertedSummarized/000002.xml")}),
    "single scene without thermal": ("tno", gone("Athena_images/lake/IR_lake_g.bmp"), {("no partner", "Athena_images/lake/VIS_lake_r.bmp")}),
    "frame without partner": ("tno", gone("FEL_images/Duine_sequence/visual/7401v.bmp"), {("no partner", "FEL_images/Duine_sequence/thermal/7401i.bmp")}),
    "truncated BMP": ("tno", cut("Athena_images/lake/IR_lake_g.bmp"), {("unreadable", "Athena_images/lake/IR_lake_g.bmp")}),
    "truncated TIFF": ("tno", cut("tank/Vis.tif", 0.5), {("unreadable", "tank/Vis.tif")}),
    "two infrared images": ("tno", picture("Athena_images/lake/IR_lake_b.bmp", lambda: gray(torch.rand(1, *SIZE))), {("two files", "Athena_images/lake/IR_lake_g.bmp")}),
    "truncated JPEG": ("roadscene", cut("crop_LR_visible/FLIR_00002D.jpg"), {("unreadable", "crop_LR_visible/FLIR_00002D.jpg")}),
    "crop of one camera gone": ("roadscene", gone("cropinfrared/FLIR_00002D.jpg"), {("no partner", "crop_LR_visible/FLIR_00002D.jpg")}),
    "training pair in test": ("msrs", lists_in_two, {("split overlap", "test/vi/00000D.png")}),
    "box beyond the image": ("msrs", text("detection/labels/6.txt", "0 0.95 0.5 0.2 0.2\n"), {("outside", "detection/labels/6.txt")}),
}


@pytest.mark.parametrize("name", [*TREES, "m3fd_yolo"])
def test_a_clean_tree_has_no_defect(trees, name):
    report = quiet(name.removesuffix("_yolo"), trees / name)
    assert found(report, trees / name) == set() and report.ok and report.pairs == (6 if name == "msrs" else N) and report.sizes == {"64x48": N}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_planted_defect_is_found_and_no_other(tree, defect):
    name, plant, expected = DEFECTS[defect]
    root = tree(name)
    plant(root)
    report = quiet(name.removesuffix("_yolo"), root)
    assert found(report, root) == expected and report.ok is (not expected)
    assert len([f for f in report.findings if f.kind not in NOTES]) == len(expected)  # each is told once
    for scene in range(len(READERS[report.dataset](root))):  # and a reader gives the scene, or one sentence
        try: READERS[report.dataset](root)[scene]
        except CafError: pass


def test_all_defects_at_once(tree):
    "Defects do not hide each other."
    root, expected = tree("m3fd"), set()
    plants = {1: gone("Ir/00001.png"), 2: cut("Vis/00002.png"), 4: text("Annotation/00004.xml", voc([("Dog", 1, 1, 5, 5)])), 5: gone("Annotation/00005.xml")}
    for plant in plants.values(): plant(root)
    expected = {("no partner", "Vis/00001.png"), ("unreadable", "Vis/00002.png"), ("unknown class", "Annotation/00004.xml"), ("no label", "Vis/00005.png")}
    assert found(quiet("m3fd", root), root) == expected


def test_counts_are_those_of_the_labels(trees):
    report = quiet("m3fd", trees / "m3fd")
    drawn = SynthScenes(N, SIZE, seed=5)
    assert report.classes == {c: sum(int((s.boxes[:, 0] == k).sum()) for s in drawn) for k, c in enumerate(M3FD_CLASSES)}
    masks = quiet("mfnet", trees / "mfnet").classes
    assert masks["car"] == sum(bool((s.mask == 1).any()) for s in SynthScenes(N, SIZE, seed=5, task="segmentation"))


@pytest.mark.parametrize("name", [*TREES, "m3fd_yolo"])
def test_whatever_is_broken_no_traceback(tree, name):
    "Random damage to random files: a finding, a sentence, or nothing, but never another exception."
    root, dice = tree(name), random.Random(name)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    for _ in range(25):
        path = dice.choice(files)
        before = raw = path.read_bytes()
        for _ in range(dice.choice((1, 3, 30))):
            k = dice.randrange(max(len(raw), 1))
            raw = {0: raw[:k], 1: raw[:k] + dice.randbytes(1) + raw[k + 1:], 2: raw[:k] + dice.randbytes(9) + raw[k:]}[dice.randrange(3)]
        path.write_bytes(raw)
        try:
            report = quiet(name.removesuffix("_yolo"), root)
            json.loads(report.json()), report.text()
        except CafError: pass
        path.write_bytes(before)
    assert quiet(name.removesuffix("_yolo"), root).ok


def test_hostile_names_are_printed_harmlessly(tree):
    root = tree("m3fd")
    write(root / "Annotation/00003.xml", voc([("\u001b]0;x".replace("\u001b", "&#x85;") + "A" * 5000, 1, 1, 5, 5)]))
    os.replace(root / "Ir/00002.png", root / "Ir/0\x1b[31m\n2.png")
    with open(os.fsencode(root / "Vis") + b"/\xff.png", "wb") as file: file.write(b"")
    run = CliRunner().invoke(data_app, ["check", str(root), "--dataset", "m3fd"])
    assert run.exit_code == 1 and "\x1b" not in run.stdout and max(map(len, run.stdout.splitlines())) < 300 and "\\x1b[31m\\n2" in run.stdout
    assert json.loads(CliRunner().invoke(data_app, ["check", str(root), "--dataset", "m3fd", "--json"]).stdout)["ok"] is False


# ---------------------------------------------------------------- split and blocks

def test_near_duplicates_are_never_parted(tmp_path):
    published.film(tmp_path, places=12, frames=6)
    whole = M3FD(tmp_path)
    scenes = find_scenes(whole.items, progress=False)
    for frames in scenes: assert len(frames) % 6 == 0  # no place is cut
    assert len(scenes) >= 10
    for seed in range(5):
        split = make_split(whole, seed, (2, 1, 1), progress=False)
        assert split == make_split(M3FD(tmp_path), seed, (2, 1, 1), progress=False)
        for place in range(12): assert len({m.part for m in split.members if int(m.stem) // 6 == place}) == 1
        assert sorted(m.stem for m in split.members) == [i.stem for i in whole.items]
    assert len({tuple(make_split(whole, seed, (2, 1, 1), progress=False).stems("test")) for seed in range(5)}) > 1


def test_a_split_is_the_same_for_ever():
    "A cited split must not change with a version of anything: this one was dealt by hand from SHA-256."
    scenes = [[f"{i:05d}"] for i in range(10)]
    import hashlib
    order = sorted(range(10), key=lambda i: hashlib.sha256(f"0 {i:05d}".encode()).digest())
    lacks, expected = {"train": 7.0, "val": 1.0, "test": 2.0}, {}
    for i in order:
        part = max(DISJOINT, key=lacks.get)
        lacks[part] -= 1
        expected[f"{i:05d}"] = part
    assert {m.stem: m.part for m in deal(scenes, (0.7, 0.1, 0.2), 0)} == expected


def test_split_file_round_trip_and_misuse(tree, tmp_path):
    root = tree("m3fd")
    split = make_split(M3FD(root), 3, (2, 1, 1), progress=False)
    write_split(tmp_path / "s.txt", split)
    assert read_split(tmp_path / "s.txt") == split
    for part in DISJOINT: assert [s.stem for s in M3FD(root, part, tmp_path / "s.txt")] == split.stems(part)
    write_split(tmp_path / "other.txt", Split("tno", 0, (1., 1., 1.), split.members))
    with pytest.raises(CafError, match="splits tno, not m3fd"): M3FD(root, "train", tmp_path / "other.txt")
    write(tmp_path / "none.txt", "00001\n")
    with pytest.raises(CafError, match="is no split file"): M3FD(root, "train", tmp_path / "none.txt")
    with pytest.raises(CafError, match="cannot be read"): M3FD(root, "train", tmp_path / "absent.txt")


def test_blocks_are_drawn_from_training_images_only(trees, tmp_path):
    split = make_split(M3FD(trees / "m3fd"), 0, (2, 1, 1), progress=False)
    write_split(tmp_path / "s.txt", split)
    sets = [M3FD(trees / "m3fd", "train", tmp_path / "s.txt"), READERS["tno"](trees / "tno"), RoadScene(trees / "roadscene")]
    drawn = blocks(sets, 100, 32, seed=1)
    assert [sum(b.dataset == s.name for b in drawn) for s in sets] == [34, 33, 33]
    assert {b.stem for b in drawn if b.dataset == "m3fd"} <= set(split.stems("train"))
    assert all(0 <= b.top <= 16 and 0 <= b.left <= 32 for b in drawn) and {b.top for b in drawn} >= {0, 16} and {b.left for b in drawn} >= {0, 32}
    assert drawn == blocks(sets, 100, 32, seed=1) != blocks(sets, 100, 32, seed=2)
    cut_out = Blocks(drawn, sets)
    assert len(cut_out) == 100 and {b.ir.shape for b in cut_out[::10]} == {(1, 32, 32)}
    with pytest.raises(CafError, match="there is no image"): Blocks(drawn, sets[:1])


def test_a_list_of_blocks_and_nothing_else(tmp_path):
    for content in ("a,b\n1,2\n", "dataset,stem,top,left,size\nm3fd,1,x,2,3\n", "dataset,stem,top,left,size\nm3fd,1\n"):
        write(tmp_path / "b.csv", content)
        with pytest.raises(CafError, match="is no list of blocks"): read_blocks(tmp_path / "b.csv")


# ---------------------------------------------------------------- the command line

def caf_data(*words):
    run = CliRunner().invoke(data_app, [str(w) for w in words])
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    assert "Traceback" not in run.output
    return run


@pytest.mark.parametrize("name", TREES)
def test_check_where_and_prepare_of_every_set(trees, tmp_path, name):
    assert caf_data("check", trees / name, "--dataset", name).exit_code == 0
    assert "page      https://" in caf_data("where", name).stdout
    words = ("prepare", trees / name, "--dataset", name, "--out", tmp_path / "out", "--ratio", 2, 1, 1, "--blocks", 20, "--size", 32)
    if name == "msrs": words += ("--names", "person,car")
    run = caf_data(*words)
    assert run.exit_code == 0, run.stderr
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert caf_data(*words).stdout == run.stdout
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert len(read_blocks(tmp_path / f"out/blocks/{name}.csv")) == 20
    assert (tmp_path / "out/split").exists() is (name not in ("tno", "roadscene")) and (tmp_path / "out/yolo").exists() is (name in ("m3fd", "multispectral"))


def test_prepared_parts_can_be_loaded(trees, tmp_path):
    for name, ratio in (("m3fd", (2, 1, 1)), ("multispectral", (3, 1, 0))):
        made = prepare(name, trees / name, tmp_path, ratio=ratio, n=10, size=32, progress=False)
        parts = {part: load_dataset(name, trees / name, part, made.split) for part in DISJOINT}
        assert sum(map(len, parts.values())) == N and all(map(len, parts.values()))
        for part, scenes in parts.items():
            assert sorted(p.stem for p in (made.yolo["vi"].parent / "images" / part).iterdir()) == [s.stem for s in scenes]
            for scene in scenes:
                rows = np.loadtxt(made.yolo["ir"].parent / f"labels/{part}/{scene.stem}.txt", ndmin=2)
                assert np.allclose(rows, scene.boxes, atol=1e-6)
    assert [s.stem for s in parts["test"]] == [s.stem for s in Multispectral(trees / "multispectral", "test")]


def test_the_detector_reads_a_prepared_folder(trees, tmp_path):
    "The classes and parts of data.yaml are those that training expects."
    from caf_nb.train.detector import _check_split
    made = prepare("m3fd", trees / "m3fd", tmp_path, ratio=(2, 1, 1), n=10, size=32, progress=False)
    for part in DISJOINT: _check_split(made.yolo["vi"], part, M3FD_CLASSES)


def test_check_exit_codes_and_json(tree):
    root = tree("m3fd")
    gone("Ir/00003.png")(root)
    run = caf_data("check", root, "--dataset", "m3fd", "--json")
    report = json.loads(run.stdout)
    assert run.exit_code == 1 and report["ok"] is False and report["pairs"] == N - 1 and report["published"] == 4200
    assert report["findings"] == [{"kind": "no partner", "file": "Vis/00003.png", "detail": "nothing of that name in Ir", "note": False}]
    assert "no partner" in caf_data("check", root, "--dataset", "m3fd").stdout
    for words, sentence in ((("check", root / "absent", "--dataset", "m3fd"), "cannot be listed"), (("check", root, "--dataset", "kaist"), "there is no data set 'kaist'"),
                            (("check", root, "--dataset", "mfnet"), "does not look like mfnet"), (("where", "llvip"), "there is no data set"),
                            (("prepare", root, "--dataset", "m3fd", "--out", root / "Vis/00000.png", "--ratio", 2, 1, 1), "00000.png/split/m3fd.txt: cannot be written"),
                            (("prepare", root, "--dataset", "m3fd", "--out", root / "o", "--ratio", 0, 0, 0), "the ratio is"),
                            (("prepare", root, "--dataset", "m3fd", "--out", root / "o", "--size", 5000, "--ratio", 2, 1, 1), "no image of m3fd is 5000 pixels")):
        run = caf_data(*words)
        assert run.exit_code == (2 if "no data set" in sentence else 1) and sentence in run.stderr and sum(line.startswith("caf-data: ") for line in run.stderr.replace("\r", "\n").splitlines()) == 1, run.stderr
    assert caf_data("check", root).exit_code == 2 and caf_data("prepare", root, "--dataset", "m3fd", "--out", root, "--seed", -1).exit_code == 2


def test_another_seed_wants_another_folder(trees, tmp_path):
    words = ("prepare", trees / "m3fd", "--dataset", "m3fd", "--out", tmp_path, "--ratio", 2, 1, 1, "--blocks", 5, "--size", 32)
    assert caf_data(*words).exit_code == 0
    run = caf_data(*words, "--seed", 1)
    assert run.exit_code == 1 and "was made from another seed or ratio" in run.stderr


def test_a_torn_archive_is_not_prepared(tree, tmp_path):
    root = tree("mfnet")
    append("train.txt", "00006D\n")(root)
    run = caf_data("prepare", root, "--dataset", "mfnet", "--out", tmp_path / "out", "--size", 32)
    assert run.exit_code == 1 and "has images in two parts (images/00006D.png: train and test)" in run.stderr and not (tmp_path / "out").exists()


def test_killed_and_started_again(tmp_path):
    "Whatever a killed run leaves, the next one ends with the same files as a run that nobody disturbed."
    published.film(tmp_path / "m3fd", places=12, frames=5)
    code = "import sys; from caf_nb.cli import data_app; data_app(sys.argv[1:])"
    def start(out):
        words = ["prepare", tmp_path / "m3fd", "--dataset", "m3fd", "--out", tmp_path / out, "--size", "32"]
        return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def files(out): return {p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert start("whole").wait() == 0
    whole, dice, midway = files("whole"), random.Random(0), 0
    for _ in range(2):
        process, wanted = start("killed"), dice.randrange(len(whole))
        while process.poll() is None and sum(1 for _ in (tmp_path / "killed").rglob("*.*")) < wanted: time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        midway += process.wait() == -signal.SIGKILL
        assert files("killed").items() <= whole.items()  # never half a file
    assert midway >= 1
    assert start("killed").wait() == 0
    assert files("killed") == whole


def test_help_without_torch():
    code = "import sys, caf_nb.cli as c; c.data_app(['check', '--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "--json" in run.stdout


# ---------------------------------------------------------------- real pairs

@pytest.mark.shared
@pytest.mark.parametrize("name, n", [("m3fd", 2), ("tno", 21), ("roadscene", 56), ("msrs", 10)])
def test_real_pairs_through_the_readers(shared, name, n):
    scenes = load_dataset(name, shared / "data" / name)
    assert len(scenes) == n and not scenes.findings
    for scene in (scenes[0], scenes[-1]):
        assert scene.ir.shape[1:] == scene.vi.shape[1:] == scene.mask.shape
        assert scene.ir.std() > 0.01 and 0 <= scene.vi.min() and scene.vi.max() <= 1
    report = quiet(name, shared / "data" / name)
    assert report.ok and report.pairs == n and sum(report.sizes.values()) == n


@pytest.mark.shared
def test_real_boxes_of_msrs(shared):
    "The counts are those of the README beside the folder."
    root, names = shared / "data/msrs_boxes", ("person", "bicycle", "car")
    report = quiet("folder", root, names=names)
    assert report.ok and report.pairs == 262 and report.classes == {"person": 677, "bicycle": 86, "car": 331}
    assert [(f.kind, f.detail) for f in report.findings] == [("no boxes", "24 of 262 pairs")]
    own, msrs = load_dataset("folder", root, names=names), load_dataset("msrs", root, names=names)
    assert [own.classes[int(k)] for k in own[11].boxes[:, 0]] == [{"bike": "bicycle"}.get(c := msrs.classes[int(k)], c) for k in msrs[11].boxes[:, 0]]


@pytest.mark.shared
def test_real_llvip_through_the_pair_reader(shared):
    "LLVIP has no reader of its own: the paper does not use it. A folder of pairs is read as any other."
    pairs = PairFolder(shared / "data/llvip/ir", shared / "data/llvip/vi")
    assert len(pairs) == 8 and not pairs.unmatched
    ir, vi = read_pair(pairs[0].ir, pairs[0].vi)
    assert ir.shape == (1, 1024, 1280) and vi.shape == (3, 1024, 1280)


@pytest.mark.shared
def test_real_blocks(shared):
    sets = [load_dataset(name, shared / "data" / name) for name in ("m3fd", "tno", "roadscene")]
    drawn = Blocks(blocks(sets, 9, 128), sets)
    assert {scene.vi.shape for scene in drawn} == {(3, 128, 128)}
