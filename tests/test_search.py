"""The search through the real task networks."""

import pytest
import torch

from caf_nb.core import SearchSettings
from caf_nb.data import MFNET_CLASSES, collate, luma, recolor
from caf_nb.fusion import FusionNet
from caf_nb.losses import TERMS, LossSpace
from caf_nb.search import hypergradient, search
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter


@pytest.fixture(scope="module")
def space():
    return LossSpace("paper")


def judges():
    return {"detection": Detector(SynthScenes(1, 32).classes), "segmentation": Segmenter(MFNET_CLASSES)}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_search_moves_every_weight_from_the_uniform_start(task, space):
    scenes = SynthScenes(6, 64, seed=3, task=task)
    torch.manual_seed(0)
    found = search(FusionNet(), judges()[task], space, scenes[:4], scenes[4:], SearchSettings(epochs=1, batch_size=2), progress=False)
    assert len(found.history) == 2 and found.history.norm.gt(0).all()
    assert found.beta.sum().item() == pytest.approx(1, abs=1e-6)
    assert (found.beta - 1 / len(TERMS)).abs().min() > 1e-5


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_finite_difference_agrees_with_autograd_through_the_task_network(task, space):
    batch = collate(SynthScenes(2, 64, seed=3, task=task)[:2])
    judge, vi = judges()[task], luma(batch.vi)
    torch.manual_seed(0)
    net = FusionNet().train()

    def val_loss(fuse):
        return judge.loss(recolor(fuse(batch.ir, vi), batch.vi), judge.targets(batch))

    both = [hypergradient(net, space, torch.zeros(15), (batch.ir, vi), val_loss, 1e-3, kind) for kind in ("finite_difference", "exact")]
    assert torch.cosine_similarity(*both, dim=0) > 0.99


def test_batch_order_does_not_matter(space):
    batch, flipped = (collate(SynthScenes(2, 48, seed=4)[:2][::d]) for d in (1, -1))
    torch.manual_seed(0)
    net = FusionNet().train()
    found = [hypergradient(net, space, torch.zeros(15), (b.ir, luma(b.vi)), lambda fuse, b=b: fuse(b.ir, luma(b.vi)).square().mean(), 1e-3, r=1e-3)
             for b in (batch, flipped)]
    torch.testing.assert_close(*found, rtol=2e-2, atol=0)
