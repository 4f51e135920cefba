"""The loss space against the official repository's values."""

import numpy as np
import pytest
import torch

from caf_nb.core import CafError
from caf_nb.losses import TERM_TABLE, TERMS, LossSpace, Term, saliency_weights
from caf_nb.losses.vgg import load_vgg


@pytest.fixture
def golden(shared):
    stored = np.load(shared / "golden/caf_loss/caf_loss.npz")
    return {k: torch.from_numpy(stored[k]) for k in stored if k != "names"} | {"names": [str(n) for n in stored["names"]]}


@pytest.fixture
def released(golden):
    vgg = load_vgg()
    with torch.no_grad():
        vgg.layers[0].weight.copy_(golden["vgg_conv1_1_weight"])
        vgg.layers[0].bias.copy_(golden["vgg_conv1_1_bias"])
    return LossSpace("released", vgg)


@pytest.mark.shared
def test_saliency_weights(golden):
    for ours, official in zip(saliency_weights(golden["ir"], golden["vi"]), (golden["w_ir"], golden["w_vi"])):
        torch.testing.assert_close(ours, official, rtol=0, atol=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_released_terms(golden, released, mode):
    official = dict(zip(golden["names"], golden[f"terms_{mode}"].tolist()))
    ours = dict(zip(TERMS, released.terms(golden[f"fused_{mode}"], golden["ir"], golden["vi"]).tolist()))
    assert set(official) - set(ours) == {"l2_ir_masked", "l2_vi_masked"}
    assert ours == pytest.approx({name: official[name] for name in TERMS}, rel=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("term", TERM_TABLE, ids=[f"{term.letter}-{term.name}" for term in TERM_TABLE])
def test_a_released_term_alone(golden, released, term: Term):
    targets = released.targets(golden["ir"], golden["vi"])
    ours = term(released.fused(golden["fused_eval"]), targets, released.variant)
    assert ours.item() == pytest.approx(golden["terms_eval"][golden["names"].index(term.name)].item(), rel=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_released_total(golden, released, mode):
    searched = [n for n in golden["names"] if n not in ("l2_ir_masked", "l2_vi_masked")]  # the released order of beta
    beta = golden["beta"].float()[[searched.index(name) for name in TERMS]]
    total = released(golden[f"fused_{mode}"], golden["ir"], golden["vi"], beta)
    assert total.item() == pytest.approx(golden[f"total_{mode}"].item(), rel=1e-5)


@pytest.mark.disable_socket
def test_imagenet_weights_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CafError, match=r"ImageNet weights of VGG-16 cannot be loaded.*vgg16-397923af\.pth.*vgg="):
        load_vgg("imagenet")
