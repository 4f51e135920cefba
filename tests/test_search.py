"""The search through the real task networks, killed and resumed, and against an independent computation."""

from copy import deepcopy

import pytest
import torch

from caf_nb.core import CafError
from caf_nb.config import SearchSettings
from caf_nb.data import MFNET_CLASSES, collate, luma, recolor
from caf_nb.fusion import FusionNet
from caf_nb.losses import TERMS, LossSpace, edges
from caf_nb.loop import NotFinite
from caf_nb.hypergradient import hypergradient
from caf_nb.search import search
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter
from caf_nb.hypergradient.oracle import peak_memory, textbook_hypergradient


@pytest.fixture(scope="module")
def space():
    return LossSpace("paper")


def judges():
    return {"detection": Detector(SynthScenes(1, 32).classes), "segmentation": Segmenter(MFNET_CLASSES)}


def through(judge, batch):
    "The loss of a real task network as a function of the fusion."
    return lambda fuse: judge.loss(recolor(fuse(batch.ir, luma(batch.vi)), batch.vi), judge.targets(batch))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_search_moves_every_weight_from_the_uniform_start(task, space):
    scenes = SynthScenes(6, 64, seed=3, task=task)
    torch.manual_seed(0)
    found = search(FusionNet(), judges()[task], space, scenes[:4], scenes[4:], SearchSettings(epochs=1, batch_size=2), progress=False)
    assert len(found.history) == 2 and found.history.norm.gt(0).all()
    assert found.beta.sum().item() == pytest.approx(1, abs=1e-6)
    assert (found.beta - 1 / len(TERMS)).abs().min() > 1e-5
    losses = [f"value_{name}" for name in TERMS] + ["task_loss", "val_loss", "fusion_loss"]
    assert found.history[losses].notna().all(axis=None) and found.history[losses].ge(0).all(axis=None)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_three_ways_agree_through_the_task_network(task, space):
    batch = collate(SynthScenes(2, 64, seed=3, task=task)[:2])
    torch.manual_seed(0)
    net, train = FusionNet().train(), (batch.ir, luma(batch.vi))
    call = net, space, torch.zeros(15), train, through(judges()[task], batch), 1e-3
    exact, finite = hypergradient(*call, "exact"), hypergradient(*call)
    assert torch.cosine_similarity(exact, finite, dim=0) > 0.999
    torch.testing.assert_close(hypergradient(*call, "neumann", neumann_terms=1), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_textbook_gives_the_same_number(variant):
    "In double precision, so that what is compared is the mathematics and not the rounding of small differences."
    batch = collate(SynthScenes(2, 64, seed=3)[:2])
    torch.manual_seed(0)
    net, space, train, judge = FusionNet().double().train(), LossSpace(variant).double(), (batch.ir.double(), luma(batch.vi).double()), judges()["detection"]

    def val_loss(fuse):
        return judge.loss(recolor(fuse(*train).float(), batch.vi), judge.targets(batch))

    start = torch.zeros(15).double()
    ours = hypergradient(net, space, start, train, val_loss, 1e-4, r=1e-2)
    theirs = textbook_hypergradient(deepcopy(net), lambda: space, start, train, val_loss, 1e-4)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


class KeepEdges(torch.nn.Module):
    "A task that is trained, and whose loss draws no random numbers."

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def loss(self, images, batch): return (self.gain * edges(luma(images)) - edges(luma(batch.vi))).abs().mean()


@pytest.mark.parametrize("order", ["printed", "beta_first"])
def test_algorithm_1_by_hand(order, space):
    "Two passes of the loop on one batch, written down a second time."
    scenes, settings = SynthScenes(2, 32, seed=5), SearchSettings(epochs=2, batch_size=1, order=order, lr_fusion=1e-3, decay_every="step", decay=0.5)
    learn, look = (collate([s]) for s in scenes)
    torch.manual_seed(0)
    net, task, alpha, norms = FusionNet().train(), KeepEdges(), torch.zeros(15), []
    found = search(deepcopy(net), deepcopy(task), space, [scenes[0]], [scenes[1]], settings, progress=False)
    by_task, by_fusion, by_alpha = (torch.optim.Adam(p, lr) for p, lr in ((task.parameters(), 1e-4), (net.parameters(), 1e-3), ([alpha], 5e-2)))

    def move_fusion():
        by_fusion.zero_grad()
        space(net(learn.ir, luma(learn.vi)), learn.ir, luma(learn.vi), alpha.softmax(0)).backward()
        by_fusion.step()

    for _ in range(2):
        by_task.zero_grad()
        with torch.no_grad(): fused = deepcopy(net)(learn.ir, luma(learn.vi))
        task.loss(recolor(fused, learn.vi), learn).backward()
        by_task.step()
        if order == "printed": move_fusion()
        alpha.grad = hypergradient(net, space, alpha, (learn.ir, luma(learn.vi)), lambda fuse: task.loss(recolor(fuse(look.ir, luma(look.vi)), look.vi), look), 1e-3)
        if order == "beta_first": move_fusion()
        by_alpha.step()
        by_alpha.param_groups[0]["lr"] *= 0.5
        norms.append(alpha.grad.norm().item())
    torch.testing.assert_close(found.alpha, alpha, rtol=1e-3, atol=1e-4)
    assert found.history.norm.tolist() == pytest.approx(norms, rel=1e-3)


def test_memory_of_a_beta_step(space):
    "At most 1.3 times that of a training step of the fusion network."
    batch = collate(SynthScenes(2, 96, seed=4)[:2])
    torch.manual_seed(0)
    net, train = FusionNet().train(), (batch.ir, luma(batch.vi))
    targets = space.targets(*train)
    training = peak_memory(lambda: space(net(*train), *train, torch.full((15,), 1 / 15), targets).backward())
    ours = peak_memory(lambda: hypergradient(net, space, torch.zeros(15), train, lambda fuse: fuse(*train).square().mean(), 1e-4, targets=targets))
    assert ours < 1.3 * training


def test_batch_order_does_not_matter(space):
    batch, flipped = (collate(SynthScenes(2, 48, seed=4)[:2][::d]) for d in (1, -1))
    torch.manual_seed(0)
    net = FusionNet().train()
    found = [hypergradient(net, space, torch.zeros(15), (b.ir, luma(b.vi)), lambda fuse, b=b: fuse(b.ir, luma(b.vi)).square().mean(), 1e-3, r=1e-3)
             for b in (batch, flipped)]
    torch.testing.assert_close(*found, rtol=2e-2, atol=0)


def test_what_breaks_is_named_and_the_last_good_state_is_kept(space, tmp_path):
    scenes = list(SynthScenes(6, 64, seed=3))
    broken = [*scenes[:3], scenes[3]._replace(ir=scenes[3].ir * float("nan"))]
    torch.manual_seed(0)
    with pytest.raises(NotFinite, match=rf"at step \d.*training batch .*{scenes[3].stem}"):
        search(FusionNet(), Detector(SynthScenes(1, 32).classes), space, broken, scenes[4:], SearchSettings(epochs=4, batch_size=1), seed=1, progress=False, folder=tmp_path)
    state = torch.load(tmp_path / "search.pt", weights_only=True)
    assert state["rows"] and all(tensor.isfinite().all() for tensor in state["net"]["tensors"].values())


def test_a_state_of_something_else_is_refused(space, tmp_path):
    scenes, file = SynthScenes(4, 32), tmp_path / "search.pt"

    def run(seed=0):
        torch.manual_seed(0)
        return search(FusionNet(), Detector(scenes.classes), space, scenes[:2], scenes[2:], SearchSettings(epochs=1, batch_size=2), seed, progress=False, folder=tmp_path)

    run()
    with pytest.raises(CafError, match="belongs to another training: seed 0 instead of 1"): run(seed=1)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit
    for wrong in (b"not a state", bytes(damaged)):
        file.write_bytes(wrong)
        with pytest.raises(CafError, match="is no state of a training"): run()
