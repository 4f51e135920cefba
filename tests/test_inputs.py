"""Published data sets as the stages see them: splits, sizes, labels, blocks, and what stays in memory."""

import shutil
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from PIL import Image

from caf_nb.core import CafError
from caf_nb.config import DataSettings, Profile
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, MULTISPECTRAL_CLASSES, collate
from caf_nb.data import load_dataset, read_split
from caf_nb.stages.sources import CLASSES, SPLITS, BlockData, Data, InMemory, find_root, fusion_blocks, in_memory, squared
from published import N, SIZE, TREES, save, voc, write

SETTINGS = DataSettings(source="published", size=32)
PARTS = {"mfnet": {"train": ["00000D", "00001N", "00002D", "00003N"], "val": ["00004D", "00005N"], "test": ["00006D", "00007N"]},
         "multispectral": {"test": ["000001", "000003", "000005", "000007"]}}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    "All archives in one folder, under the names that their authors give them."
    root = tmp_path_factory.mktemp("archives")
    names = {"m3fd": "M3FD/M3FD_Detection", "mfnet": "ir_seg_dataset", "multispectral": "ir_det_dataset", "tno": "TNO_Image_Fusion_Dataset",
             "roadscene": "RoadScene-master", "msrs": "MSRS"}
    for name, folder in names.items(): TREES[name](root / folder)
    return root


@pytest.fixture(autouse=True)
def splits_of_this_test(monkeypatch, tmp_path):
    "Made splits go where nobody else finds them."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data(name, root, **more) -> Data: return Data(name=name, settings=SETTINGS, root=str(root), **more)


# ---------------------------------------------------------------- splits

@pytest.mark.parametrize("name", CLASSES)
def test_every_scene_is_in_one_split(data_root, name):
    of = data(name, data_root)
    stems = {which: of.stems(which) for which in SPLITS}
    everything = [item.stem for item in load_dataset(name, find_root(data_root, name)).items]
    assert sorted(sum(stems.values(), [])) == sorted(everything)
    assert all(stems.values())
    assert {which: stems[which] for which in PARTS.get(name, {})} == PARTS.get(name, {})


def test_a_made_split_keeps_frames_of_a_place_together_and_stays(tmp_path):
    published.film(tmp_path / "M3FD", places=10, frames=3)
    of = data("m3fd", tmp_path)
    place = {which: {int(stem) // 3 for stem in of.stems(which)} for which in SPLITS}
    assert not place["train"] & place["test"] and not place["train"] & place["val"] and not place["val"] & place["test"]
    file, = (tmp_path / "cache/caf_nb/splits").glob("m3fd-*.txt")
    assert read_split(file).seed == 0
    chosen = tmp_path / "mine.txt"  # the same scenes, dealt by somebody else
    chosen.write_text(file.read_text().replace("\ntest ", "\nTEST ").replace("\ntrain ", "\ntest ").replace("\nTEST ", "\ntrain "))
    other = data("m3fd", tmp_path, split_file=str(chosen))
    assert other.stems("train") == of.stems("test") and other.files != of.files
    shutil.copytree(tmp_path / "M3FD", tmp_path / "with/M3FD")
    write(tmp_path / "with/M3FD/split/m3fd.txt", chosen.read_text())
    assert data("m3fd", tmp_path / "with").stems("train") == other.stems("train")  # where caf-data prepare can put it


def test_a_smaller_profile_takes_evenly_spaced_scenes(data_root):
    small = Data.of("mfnet", Profile.named("smoke").data.model_copy(update={"train": 2, "test": 1}), data_root)
    assert (small.stems("train"), small.stems("test"), small.stems("val")) == (["00000D", "00002D"], ["00006D"], ["00004D", "00005N"])
    assert [scene.stem for scene in small.whole("train")] == small.stems("train")


# ---------------------------------------------------------------- sizes and labels

@pytest.mark.parametrize("name", CLASSES)
def test_squares_stack_and_whole_scenes_keep_their_size(data_root, name):
    of = data(name, data_root)
    for which in SPLITS:
        batch = collate(of.split(which)[:2])
        assert batch.ir.shape[1:] == (1, 32, 32) and batch.vi.shape[1:] == (3, 32, 32) and batch.mask.shape[1:] == (32, 32)
        assert ((batch.vi * 255) - (batch.vi * 255).round()).abs().max() < 1e-4
        for square, scene in zip(of.split(which), of.whole(which), strict=True):
            assert scene.ir.shape == (1, *SIZE) and square.stem == scene.stem and torch.equal(square.boxes, scene.boxes)


def planted(name: str, root: Path) -> tuple[slice, slice]:
    "Make every picture of an archive dark, with one bright thing of class 1 at known rows and columns."
    rows, columns = slice(12, 36), slice(24, 40)
    bright = np.zeros(SIZE, np.uint8)
    bright[rows, columns] = 255
    for path in sorted(root.rglob("*.png")):
        channels = np.array(Image.open(path)).ndim == 3 and np.array(Image.open(path)).shape[2]
        if path.parent.name == "labels": save(path, (bright > 0).astype(np.uint8))
        else: save(path, np.dstack([bright] * channels) if channels else bright)
    raw = {"m3fd": "Car", "multispectral": "car"}.get(name)
    for path in root.rglob("*.xml"): write(path, voc([(raw, columns.start, rows.start, columns.stop, rows.stop)]))
    return rows, columns


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_planted_thing_is_where_its_label_says(tmp_path, name, size):
    root = tmp_path / name
    TREES[name](root)
    data(name, tmp_path).stems("val")  # pictures that all look the same could not be dealt out any more
    made = next((tmp_path / "cache").rglob(f"{name}-*.txt"), "")
    rows, columns = planted(name, root)
    of = Data(name=name, settings=DataSettings(source="published", size=size), root=str(tmp_path), split_file=str(made))
    expected = torch.zeros(size, size, dtype=torch.bool)
    top, bottom, left, right = (round(size * v / side) for v, side in ((rows.start, SIZE[0]), (rows.stop, SIZE[0]), (columns.start, SIZE[1]), (columns.stop, SIZE[1])))
    expected[top:bottom, left:right] = True
    for which in SPLITS:
        for scene in of.split(which):
            assert torch.equal(scene.ir[0] > 0.5, expected) and torch.equal(scene.vi[1] > 0.5, expected)
            if name == "mfnet": assert torch.equal(scene.mask == 1, expected) and MFNET_CLASSES[1] == "car"
            else:
                kind, *box = scene.boxes[0].tolist()
                assert of.classes[int(kind)] == "Car"
                assert box == pytest.approx([(left + right) / 2 / size, (top + bottom) / 2 / size, (right - left) / size, (bottom - top) / size])


def test_classes_come_by_name(data_root):
    assert [data(n, data_root).classes for n in CLASSES] == [M3FD_CLASSES, MULTISPECTRAL_CLASSES, MFNET_CLASSES]
    assert all(kind < 5 for which in SPLITS for scene in data("multispectral", data_root).split(which) for kind in scene.boxes[:, 0].tolist())


# ---------------------------------------------------------------- identity

@pytest.mark.parametrize("name", CLASSES)
def test_a_moved_archive_is_the_same_and_a_changed_one_is_not(data_root, tmp_path, name):
    root = tmp_path / "copy"
    shutil.copytree(data_root, root)
    here, there = data(name, data_root), data(name, root)
    assert (here.files, here.root) != (there.files, there.root) and here.files == there.files
    label = next(iter(sorted(find_root(root, name).rglob("labels/*.png" if name == "mfnet" else "*.xml"))))
    if name == "mfnet":
        mask = np.array(Image.open(label))
        mask[0, 0] = 8 - mask[0, 0]
        save(label, mask)
    else: label.write_text(label.read_text().replace("<difficult>0", "<difficult>1"))
    assert data(name, root).files != here.files
    shutil.rmtree(find_root(root, name))
    assert Data(**there.model_dump()) == there  # a stored configuration needs no archive
    with pytest.raises(CafError, match=f"has no folder of {name}"): data(name, root)


def test_synthetic_data_are_what_they_were():
    embedded = DataSettings(source="embedded", size=64, train=2, val=1, test=1)
    assert Data(name="m3fd", settings=embedded).model_dump(exclude_defaults=True) == {"name": "m3fd", "settings": {"source": "embedded", "size": 64, "train": 2, "val": 1, "test": 1}}


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_wrong_is_said_when_data_are_named(tmp_path, name):
    with pytest.raises(CafError, match=f"where the published {name} is"): Data(name=name, settings=SETTINGS)
    with pytest.raises(CafError, match="no such folder"): data(name, tmp_path / "nowhere")
    (tmp_path / name).mkdir()
    with pytest.raises(CafError, match=f"does not look like {name}"): data(name, tmp_path)


def test_unlabelled_pairs_are_not_labelled_data(tmp_path):
    published.m3fd(tmp_path / "M3FD", labels="")
    with pytest.raises(CafError, match="has no boxes for 00000"): data("m3fd", tmp_path)


# ---------------------------------------------------------------- blocks, memory

def test_blocks_of_three_sets(data_root):
    whole = DataSettings(source="published", size=32, blocks=9, block_size=24)
    of = Data(name="m3fd", settings=whole, root=str(data_root))
    mixed = fusion_blocks(of)
    drawn = mixed.split("train")
    assert [block.dataset for block in drawn.blocks] == ["m3fd"] * 3 + ["tno"] * 3 + ["roadscene"] * 3
    assert {block.stem for block in drawn.blocks if block.dataset == "m3fd"} <= set(of.stems("train"))
    assert collate(drawn).vi.shape == (9, 3, 24, 24)
    assert fusion_blocks(Data(name="mfnet", settings=whole, root=str(data_root))) == mixed  # one training for both tasks
    assert mixed.title == "9 blocks of 24x24 from m3fd, tno, roadscene" and hash(mixed) == hash(mixed.model_copy())


def test_scenes_in_memory_are_the_same_whatever_fits(data_root):
    scenes = data("mfnet", data_root).split("train")
    for room in (0, 6000, 2 ** 20):
        kept = in_memory(scenes, room)
        for _ in range(2):
            for a, b in zip(kept, scenes, strict=True): assert a.stem == b.stem and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a[1:], b[1:]))
    assert isinstance(kept, InMemory) and len(kept[1:3]) == 2


def test_a_training_decodes_each_published_scene_once(data_root, monkeypatch):
    scenes, seen = data("mfnet", data_root).split("train"), []
    read = type(scenes.published).images
    monkeypatch.setattr(type(scenes.published), "images", lambda self, item: (seen.append(item.stem), read(self, item))[1])
    kept = in_memory(scenes)
    for _ in range(3): collate([kept[i] for i in range(len(kept))])
    assert sorted(seen) == sorted(PARTS["mfnet"]["train"])


@pytest.mark.shared
def test_real_pairs_through_the_same_readers(shared):
    root = shared / "data"
    for name in ("m3fd", "tno", "roadscene", "msrs"):
        pairs = load_dataset(name, find_root(root, name))
        small = squared(pairs[0], 96)
        assert len(pairs) and small.ir.shape == (1, 96, 96) and 0.02 < small.ir.std() and 0.02 < small.vi.std()
    with pytest.raises(CafError, match="has no boxes"): data("m3fd", root)  # pairs for fusion, without labels
    mixed = BlockData(sets=("tno", "roadscene", "msrs"), blocks=6, block_size=96, root=str(root))
    batch = collate(in_memory(mixed.split("train"))[:])
    assert batch.ir.shape == (6, 1, 96, 96) and batch.vi.std(dim=(1, 2, 3)).min() > 0.001  # one of them is of a dark night


# ---------------------------------------------------------------- stages

@pytest.mark.slow
def test_from_an_archive_to_a_score(data_root, tmp_path):
    "Search, training, fusion and fine-tuning on a published tree; then the archive moves, and nothing is computed again."
    from caf_nb.stages import FinetuneDetector, FuseDataset, Search, TrainFusion
    smoke, cache = Profile.named("smoke"), {"folder": str(tmp_path / "stages")}
    archive = tmp_path / "here"
    archive.mkdir()
    shutil.copytree(data_root / "M3FD", archive / "M3FD")

    def chain(root):
        def data(): return Data.of("m3fd", DataSettings(source="embedded", size=64), root)
        found = Search(data=data(), settings=smoke.search, detector=smoke.detector, infra=cache)
        trained = TrainFusion(data=data(), loss=found, settings=smoke.fusion, infra=cache)
        judge = smoke.detector.model_copy(update={"epochs": 1})
        return data(), found, trained, FinetuneDetector(fused=FuseDataset(data=data(), model=trained, infra=cache), settings=judge, infra=cache)

    of, found, trained, scored = chain(archive)
    result = scored.run()
    assert set(result.ap) == set(M3FD_CLASSES) and len(found.run().history) == 2 and sum(found.run().beta.values()) == pytest.approx(1, abs=1e-5)
    assert "published m3fd" in trained.provenance()["fusion network"]
    pictures = scored.fused.run()
    for which in SPLITS:
        assert sorted(p.stem for p in (pictures / "images" / which).iterdir()) == sorted(of.stems(which))
        assert {Image.open(p).size for p in (pictures / "images" / which).iterdir()} == {SIZE[::-1]}  # as published, not squares
        for scene in of.whole(which):
            rows = [list(map(float, row.split())) for row in (pictures / "labels" / which / f"{scene.stem}.txt").read_text().splitlines()]
            assert rows == [pytest.approx(row, abs=1e-5) for row in scene.boxes.tolist()]

    archive.rename(tmp_path / "there")
    moved = chain(tmp_path / "there")
    assert [stage.infra.status() for stage in (*moved[1:], moved[3].fused)] == ["completed"] * 4
    assert moved[3].run().losses == result.losses


def masked(root: Path, kind: str) -> None:
    "A folder of one's own with masks, or MSRS with those of its authors."
    if kind == "MSRS":
        published.msrs(root)
        return shutil.rmtree(root / "detection")
    for i, scene in enumerate(published.SynthScenes(N, SIZE, seed=5, task="segmentation")):
        part = SPLITS[max(i - N + 3, 0)]
        for folder, pixels in (("ir", published.gray(scene.ir)), ("vi", published.rgb(scene.vi)), ("masks", scene.mask.numpy().astype(np.uint8))):
            save(root / part / folder / f"{scene.stem}.png", pixels)
    write(root / "data.yaml", f"names: {list(MFNET_CLASSES)}\n")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind, name", [("mine", "mine"), ("MSRS", "msrs")])
def test_masks_of_ones_own_from_search_to_score(tmp_path, kind, name):
    "The rows of Table 2 on a folder that nothing in the package names."
    from caf_nb.rows import Setup
    from caf_nb.stages.sources import task_sets

    masked(tmp_path / "data" / kind, kind)
    smoke, shorter = Profile.named("smoke"), {"epochs": 1, "batch_size": 2}
    profile = smoke.model_copy(update={
        "data": DataSettings(source="embedded", size=64), "search": smoke.search.model_copy(update=shorter),
        "fusion": smoke.fusion.model_copy(update=shorter | {"crop": 32}), "segmenter": smoke.segmenter.model_copy(update={"steps": 2})})
    setup = Setup(profile=profile, data_root=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    assert task_sets(setup.data_root) == {name: ("segmentation",)}
    stage = setup.score(name, "caf", "segmentation")
    scores = stage.scores()
    assert stage.fused.data.masks and len(stage.run().losses) == 2 and 0 <= scores["mIoU"] <= 100
    assert {key.removeprefix("IoU ") for key in scores if key.startswith("IoU ")} == set(stage.fused.data.classes)
    assert sum(stage.fused.model.loss.run().beta.values()) == pytest.approx(1, abs=1e-5)
