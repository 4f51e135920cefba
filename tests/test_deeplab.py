"""DeepLabV3+: files of the make of the public Cityscapes checkpoints compute here what they compute in the code that they were trained with."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from caf_nb.core import CafError
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Task

pytest.importorskip("segmentation_models_pytorch", reason="DeepLab needs segmentation-models-pytorch")
from caf_nb.tasks import CITYSCAPES_CLASSES, DEEPLABS, DeepLab, find_deeplab, segment, shared_classes, show_segmented# noqa: E402

GAIN = {"mobilenet": 6, "resnet101": 2}  # so that neither network's answer vanishes or explodes


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    "Names and shapes of the weights in the public checkpoint, written down from the published network and not from ours."
    found: dict[str, tuple[int, ...]] = {}

    def norm(name: str, c: int):
        found.update({f"{name}.{part}": (c,) for part in ("weight", "bias", "running_mean", "running_var")} | {f"{name}.num_batches_tracked": ()})

    def layer(name: str, norm_name: str, c_out: int, c_in: int, k: int):
        found[f"{name}.weight"] = (c_out, c_in, k, k)
        norm(norm_name, c_out)

    def mobilenet():
        layer("backbone.low_level_features.0.0", "backbone.low_level_features.0.1", 32, 3, 3)
        c, i = 32, 1
        for t, c_out, n in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
            for _ in range(n):
                conv = f"backbone.{'low' if i < 4 else 'high'}_level_features.{i}.conv"
                if t > 1:
                    layer(f"{conv}.0.0", f"{conv}.0.1", t * c, c, 1)
                layer(f"{conv}.{int(t > 1)}.0", f"{conv}.{int(t > 1)}.1", t * c, 1, 3)
                layer(f"{conv}.{1 + (t > 1)}", f"{conv}.{2 + (t > 1)}", c_out, t * c, 1)
                c, i = c_out, i + 1
        return 24, 320

    def resnet101():
        layer("backbone.conv1", "backbone.bn1", 64, 3, 7)
        c = 64
        for stage, (width, n) in enumerate(((64, 3), (128, 4), (256, 23), (512, 3)), 1):
            for i in range(n):
                block = f"backbone.layer{stage}.{i}"
                for k, (c_out, c_in, side) in enumerate(((width, c, 1), (width, width, 3), (4 * width, width, 1)), 1):
                    layer(f"{block}.conv{k}", f"{block}.bn{k}", c_out, c_in, side)
                if i == 0:
                    layer(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, c, 1)
                c = 4 * width
        return 256, 2048

    low, high = {"mobilenet": mobilenet, "resnet101": resnet101}[model]()
    layer("classifier.project.0", "classifier.project.1", 48, low, 1)
    for i, (c_in, side) in enumerate(((high, 1), (high, 3), (high, 3), (high, 3))):
        layer(f"classifier.aspp.convs.{i}.0", f"classifier.aspp.convs.{i}.1", 256, c_in, side)
    layer("classifier.aspp.convs.4.1", "classifier.aspp.convs.4.2", 256, high, 1)
    layer("classifier.aspp.project.0", "classifier.aspp.project.1", 256, 1280, 1)
    layer("classifier.classifier.0", "classifier.classifier.1", 256, 304, 3)
    found.update({"classifier.classifier.3.weight": (19, 256, 1, 1), "classifier.classifier.3.bias": (19,)})
    return found


def waves(model: str) -> dict[str, Tensor]:
    "Weights that anybody can make again: waves, from the place of each tensor in the sorted list of names."
    state = {}
    for k, (name, shape) in enumerate(sorted(shapes(model).items())):
        size = int(np.prod(shape))
        wave = torch.sin(torch.arange(size, dtype=torch.float64) * 12.9898 + k * 78.233).reshape(shape)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) > 1:
            state[name] = (wave * (GAIN[model] * shape[0] / size) ** 0.5).float()
        elif name.endswith("running_var"):
            state[name] = (1 + 0.5 * wave).float()
        elif name.endswith("weight"):
            state[name] = (0.5 + 0.3 * wave).float()
        else:
            state[name] = (0.3 * wave).float()
    return state


def image(h: int, w: int) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    return torch.stack([x, y, (torch.sin(9 * x * y) + 1) / 2])[None]


@pytest.fixture(scope="module", params=DEEPLABS)
def checkpoint(request, tmp_path_factory):
    "A file with everything that a public checkpoint holds."
    file = tmp_path_factory.mktemp("deeplab") / f"best_deeplabv3plus_{request.param}_cityscapes_os16.pth"
    state = waves(request.param)
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"cur_itrs": 30000, "model_state": state, "optimizer_state": optimizer, "scheduler_state": {"power": 0.9, "base_lrs": [0.01]},
                "best_score": np.float64(0.721)}, file)  # fmt: skip
    yield request.param, file, state
    file.unlink()


# Answers of the authors' own code (VainF/DeepLabV3Plus-Pytorch, network/, as of e9baf17, c7d8bb8 and 6656d16) for `waves` and `image`: every third class at
# one pixel, and class 3 along the left border. 304 x 336 is large enough for all dilations of the ASPP; 47 and 61 are multiples of nothing.
ANSWERS = {
    ("mobilenet", 47, 61): ([5.8662, -6.9534, -6.2583, 6.5481, 6.6673, -6.1705, -7.1306], [-4.7351, -4.7587, -4.9342, -5.0513, -5.0476, -4.8913, -4.6873]),
    ("mobilenet", 304, 336): ([0.5631, -2.4034, -0.6011, 2.4385, 0.6902, -2.5261, -0.8698], [-2.7555, -3.956, -3.8308, -2.6804, -3.5623, -3.6503, -2.896]),
    ("resnet101", 47, 61): ([20.6296, -19.8297, -22.3129, 17.9893, 23.7915, -15.9873, -25.0254],
                            [-19.0918, -19.1252, -19.3034, -19.5311, -19.8778, -20.2243, -20.4481]),
    ("resnet101", 304, 336): ([20.4898, -19.6877, -22.162, 17.859, 23.6305, -15.8695, -24.8552],
                              [-17.4178, -18.2694, -18.2343, -18.3035, -18.6411, -18.9649, -19.422]),
}  # fmt: skip


@torch.no_grad()
def test_it_answers_as_the_code_of_the_checkpoints_does(checkpoint):
    model, file, _ = checkpoint
    deeplab = DeepLab(file).eval()
    assert (deeplab.model, deeplab.provenance) == (model, file.name)
    for h, w in ((47, 61), (304, 336)):
        logits = deeplab.logits(image(h, w))[0]
        middle, border = ANSWERS[model, h, w]
        # the dilations and paddings that names and shapes do not tell change these numbers by 4e-4 (ASPP of the ResNet) to 0.2
        assert logits[::3, h // 2, w // 2].tolist() == pytest.approx(middle, abs=2e-4)
        assert logits[3, :: h // 6, 0].tolist() == pytest.approx(border, abs=2e-4)
        assert torch.equal(deeplab.predict(image(h, w))[0], logits.argmax(0))


def test_every_tensor_of_the_file_has_its_place_and_its_say(checkpoint):
    model, file, state = checkpoint
    deeplab = DeepLab(file).eval()
    own = deeplab.net.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[name], t) for name, t in state.items())
    deeplab.logits(image(64, 80)).square().sum().backward()
    assert [name for name, p in deeplab.net.named_parameters() if not p.grad.any()] == []  # evaluation reads the other tensors, mean and variance, by itself


def test_other_containers_of_the_same_weights_will_do(checkpoint, tmp_path):
    from safetensors.torch import save_file

    model, file, state = checkpoint
    if model != "mobilenet":
        pytest.skip("one network is enough")
    save_file(state, tmp_path / "converted.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"model_state": state, "best_score": np.float64(0.7)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    published = DeepLab(file).predict(image(48, 64))
    for name in ("converted.safetensors", "plain.pth", "legacy.pth"):
        assert torch.equal(DeepLab(tmp_path / name).predict(image(48, 64)), published)
    with pytest.raises(CafError, match="do not fit the network"):
        DeepLab(file, model="resnet101")


class Payload:
    def __reduce__(self):
        return (os.putenv, ("CAF_NB_TEST_PWNED", "1"))


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"model_state": waves("mobilenet"), "best_score": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CafError, match="everything else in the pickle is refused"):
        DeepLab(tmp_path / "evil.pth")


def test_it_is_a_task_that_learns():
    deeplab, scenes = DeepLab(), SynthScenes(2, 64)
    assert isinstance(deeplab, Task)
    images, mask = torch.stack([s.vi for s in scenes]), shared_classes(torch.stack([s.mask for s in scenes]))
    optimizer, losses = torch.optim.Adam(deeplab.parameters(), 1e-3), []
    for _ in range(3):
        losses.append(deeplab.loss(images, mask))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    mask[:, :32] = 255
    assert deeplab.eval().loss(images, mask).isfinite()


def test_the_mode_and_the_generator_stay_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, other = DeepLab(seed=1), DeepLab(seed=2)
    assert torch.equal(torch.rand(1), expected)
    one.predict(image(32, 32))
    assert one.training
    weights = [next(d.parameters()) for d in (one, DeepLab(seed=1), other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_figure_with_a_checkpoint_and_without(checkpoint):
    _, file, _ = checkpoint
    import matplotlib.pyplot as plt

    scene = SynthScenes(1, 64, task="segmentation")[0]
    pictures = {"ir": (scene.ir * 255).byte(), "vi": scene.vi}
    for deeplab, expected in ((DeepLab(file), CITYSCAPES_CLASSES), (None, ("rest", "person", "car", "bicycle"))):
        seen = segment(pictures, deeplab, scene)
        assert seen.classes == expected and {tuple(t.shape) for t in seen.labels.values()} == {(64, 64)}
        axes = show_segmented(pictures, *seen)
        legend = {text.get_text() for text in axes[0][0].figure.legends[0].get_texts()}
        occurring = {expected[i] for t in seen.labels.values() for i in t.unique().tolist()}
        assert legend == occurring - {"rest"}
        plt.close()


def test_of_two_checkpoints_the_larger_network_is_taken(tmp_path):
    assert find_deeplab("") is None and find_deeplab(tmp_path) is None
    (tmp_path / "deeplab").mkdir()
    for model in DEEPLABS:
        (tmp_path / f"deeplab/best_deeplabv3plus_{model}_cityscapes_os16.pth").touch()
    assert find_deeplab(tmp_path).name == "best_deeplabv3plus_resnet101_cityscapes_os16.pth"


@pytest.mark.long
@pytest.mark.slow
def test_figure_4_with_a_checkpoint(checkpoint, tmp_path):
    model, file, _ = checkpoint
    if model != "mobilenet":
        pytest.skip("one network is enough")
    (tmp_path / "weights/deeplab").mkdir(parents=True)
    (tmp_path / "weights/deeplab" / file.name).symlink_to(file)
    command = [sys.executable, "-m", "papermill", "nbs/figure4.ipynb", str(tmp_path / "figure4.ipynb"), "-k", "python3", "-p", "out", str(tmp_path / "results"),
               "-p", "weights_root", str(tmp_path / "weights"), "-p", "methods", "ir,vi"]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"DeepLabV3+ (mobilenet, weights {file.name})" in (tmp_path / "figure4.ipynb").read_text()
    shares = pd.read_csv(tmp_path / "results/figure4.csv")
    assert set(shares["class"]) <= set(CITYSCAPES_CLASSES) and shares.groupby(["scene", "picture"]).percent.sum().tolist() == pytest.approx([100] * 4)
    assert len(list((tmp_path / "results").glob("figure4_synthetic_*.png"))) == 2
