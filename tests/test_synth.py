"The exported scene generator: reproducible, complete, and labelled by what can be seen."
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from caf_nb.core import CafError
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, MULTISPECTRAL_CLASSES, luma
from caf_nb.synth import KINDS, TASK_CLASSES, SynthScenes

DIGEST = """
import hashlib
from caf_nb.synth import SynthScenes
d = hashlib.sha256()
for i in (0, 1, 2):
    for x in SynthScenes(3, (48, 63), seed=5)[i][1:]: d.update(x.numpy().tobytes())
print(d.hexdigest())
"""


def same(a, b):
    return a.stem == b.stem and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))


def pixels(box, h, w):
    "Left, top, right, bottom of a YOLO row in pixels."
    cx, cy, bw, bh = (box[1:].double() * torch.tensor([w, h, w, h])).tolist()
    return cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2


@pytest.fixture(scope="module")
def drawn():
    "Forty scenes before they get class numbers."
    scenes = SynthScenes(40, 96, seed=0)
    return [scenes.render(i) for i in range(40)]


def test_deterministic_across_processes():
    outputs = {subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    digest = hashlib.sha256()
    for i in (0, 1, 2):
        for x in SynthScenes(3, (48, 63), seed=5)[i][1:]: digest.update(x.numpy().tobytes())
    assert outputs == {digest.hexdigest() + "\n"}


def test_scene_depends_on_size_seed_and_number_only():
    reference = SynthScenes(3, 64, seed=2)[2]
    assert same(reference, SynthScenes(500, 64, seed=2)[2])
    for task in TASK_CLASSES:
        other = SynthScenes(7, (64, 64), seed=2, task=task)[2]
        assert torch.equal(other.ir, reference.ir) and torch.equal(other.vi, reference.vi) and torch.equal(other.mask, reference.mask)
    assert not torch.equal(SynthScenes(3, 64, seed=3)[2].vi, reference.vi)
    assert not torch.equal(SynthScenes(3, 64, seed=2)[0].vi, reference.vi)


def test_global_generators_are_left_alone():
    np.random.seed(0); torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    SynthScenes(2, 40)[1]
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize("size", [32, 33, 97, (45, 80), (101, 63), (64, 33)])
def test_shapes_ranges_and_types(size):
    h, w = (size, size) if isinstance(size, int) else size
    for task, boxed in (("detection", M3FD_CLASSES), ("multispectral", MULTISPECTRAL_CLASSES), ("segmentation", M3FD_CLASSES)):
        scenes = SynthScenes(4, size, seed=1, task=task)
        assert scenes.classes == TASK_CLASSES[task] and scenes.box_classes == boxed
        for scene in scenes:
            assert scene.ir.shape == (1, h, w) and scene.vi.shape == (3, h, w) and scene.mask.shape == (h, w)
            assert scene.ir.dtype == scene.vi.dtype == scene.boxes.dtype == torch.float32 and scene.mask.dtype == torch.int64
            for image in (scene.ir, scene.vi): assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.01
            assert 0 <= scene.mask.min() and scene.mask.max() < len(MFNET_CLASSES)
            assert scene.boxes.ndim == 2 and scene.boxes.shape[1] == 5
            assert set(scene.boxes[:, 0].tolist()) <= set(range(len(boxed)))
            for box in scene.boxes:
                left, top, right, bottom = pixels(box, h, w)
                assert left > -1e-3 and top > -1e-3 and right < w + 1e-3 and bottom < h + 1e-3
                assert right - left > 2.99 and bottom - top > 2.99


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_class_occurs_in_sixteen_scenes(seed):
    for task, names in (("detection", M3FD_CLASSES), ("multispectral", MULTISPECTRAL_CLASSES)):
        rows = [scene.boxes for scene in SynthScenes(16, 96, seed=seed, task=task)]
        assert set(torch.cat(rows)[:, 0].long().tolist()) == set(range(len(names)))
        assert 3 <= np.mean([len(r) for r in rows]) <= 7
    masks = [scene.mask for scene in SynthScenes(16, 96, seed=seed, task="segmentation")]
    assert set(torch.stack(masks).unique().tolist()) == set(range(len(MFNET_CLASSES)))


def test_boxes_are_tight_and_agree_with_the_mask():
    for task, column in (("detection", 0), ("multispectral", 1)):
        scenes = SynthScenes(8, (96, 120), seed=4, task=task)
        for i, scene in enumerate(scenes):
            ids, kinds = scenes.render(i).ids, scenes.render(i).kinds
            numbers = [n for n in np.unique(ids)[1:] if KINDS[kinds[n - 1]][column] is not None]
            assert len(numbers) == len(scene.boxes)
            for n, box in zip(numbers, scene.boxes):
                rows, columns = np.nonzero(ids == n)
                tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                np.testing.assert_allclose(pixels(box, 96, 120), tight, atol=1e-3)
                assert scenes.box_classes[int(box[0])] == KINDS[kinds[n - 1]][column]
                label = KINDS[kinds[n - 1]][2] or "unlabelled"
                assert (scene.mask[rows, columns] == MFNET_CLASSES.index(label)).all()
            left = ~np.isin(ids, [n for n in np.unique(ids)[1:] if KINDS[kinds[n - 1]][2]])
            assert (scene.mask[torch.from_numpy(left)] == 0).all()


def contrast(image, inside, around):
    "Difference of the means of object and background."
    return abs(image[inside].mean() - image[around].mean())


def contrasts(drawn, kinds, night):
    "(things, 2): contrast in ir and in the luminance of vi for all things of some kinds."
    rows = []
    for d in drawn:
        gray = luma(torch.from_numpy(d.vi).permute(2, 0, 1))[0].numpy()
        for n in np.unique(d.ids)[1:]:
            if d.kinds[n - 1] not in kinds or d.night != night: continue
            rows_, columns = np.nonzero(d.ids == n)
            around = np.zeros_like(d.ids, bool)
            around[max(rows_.max() - 12, 0):rows_.max() + 5, max(columns.min() - 5, 0):columns.max() + 6] = True # the ground at its foot
            around &= d.ids == 0
            inside = (d.ids == n) & (np.arange(len(d.ids))[:, None] >= rows_.max() - 12)
            if around.sum() > 5: rows.append((contrast(d.ir, inside, around), contrast(gray, inside, around)))
    return np.array(rows)


def test_people_at_night_are_for_infrared(drawn):
    night, day = contrasts(drawn, ["person"], True), contrasts(drawn, ["person"], False)
    assert len(night) > 20 and np.median(night[:, 0]) > 0.2 and np.median(night[:, 1]) < 0.08
    assert np.median(day[:, 0]) > 0.1 and np.median(day[:, 1]) > np.median(night[:, 1])


@pytest.mark.parametrize("night", [False, True])
def test_cold_things_are_for_the_visible_camera(drawn, night):
    cold = contrasts(drawn, ["cone", "car_stop", "bump"], night)
    assert len(cold) > 20 and np.median(cold[:, 0]) < 0.05 and np.median(cold[:, 1]) > 2 * np.median(cold[:, 0])


def test_day_and_night_alternate_and_the_stem_says_so(drawn):
    assert [d.night for d in drawn[:4]] == [False, True, False, True]
    assert [s.stem for s in SynthScenes(2, 32)] == ["00000D", "00001N"]
    assert np.mean([d.vi.mean() for d in drawn if not d.night]) > 3 * np.mean([d.vi.mean() for d in drawn if d.night])


def test_it_is_a_sequence():
    scenes = SynthScenes(5, 32, seed=9)
    assert len(scenes) == 5 and len(list(scenes)) == 5 and same(scenes[-1], scenes[4]) and len(scenes[1:4]) == 3
    assert len(SynthScenes(0, 32)) == 0 and list(SynthScenes(0, 32)) == []
    for i in (5, -6):
        with pytest.raises(IndexError): scenes[i]


@pytest.mark.parametrize("arguments, part", [
    ((-1, 64), "n is -1"), ((2.5, 64), "n is 2.5"), ((True, 64), "n is True"), ((1, 31), "size is 31"), ((1, (64, 20)), "size is 20"),
    ((1, (64, 64, 3)), "size is"), ((1, "64"), "size is '64'"), ((1, 64.0), "size is 64.0"), ((1, 64, -1), "seed is -1"), ((1, 64, 0, "depth"), "segmentation")])
def test_errors_name_the_value(arguments, part):
    with pytest.raises(CafError, match=part.replace(".", r"\.")): SynthScenes(*arguments)
