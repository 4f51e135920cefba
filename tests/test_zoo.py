"""Every method of the table: the official outputs, wrong checkpoints, and its training."""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from caf_nb import fusion
from caf_nb.checkpoints import load_tensors
from caf_nb.core import CafError
from caf_nb.config import DataSettings, FusionSettings, Profile, SearchSettings
from caf_nb.data import luma, read_image, to_uint8
from caf_nb.fusion import _in_strips, build_engine, fuse, load_fusion, save_fusion
from caf_nb.losses import TERMS, LossSpace
from caf_nb.stages.sources import Data
from caf_nb.stages import Search
from caf_nb.synth import SynthScenes
from caf_nb.train import caf_recipe, train_fusion
from caf_nb.zoo import METHODS, build_network, find_method, method_table
from caf_nb.zoo.export import to_onnx
from caf_nb.zoo.umfusion import ms_ssim


class Golden(NamedTuple):
    "Where the official outputs of a method are, and how they are to be met."
    method: str
    folder: str                                            # of shared/golden
    weights: tuple[str, ...] = ()                          # official files in shared/weights, beside state.safetensors
    out: str = "out"                                       # array of io.npz: out0, out1, out2
    options: dict = {}                                     # of load_fusion
    to_unit: Callable[[torch.Tensor], torch.Tensor] = lambda out: out # from the stored range to that of our network
    tolerance: float = 1e-5
    relative: bool = False                                 # to the largest value


GOLDEN = (
    Golden("caf", "caf_det", ("caf/Det_final.pth",)),
    Golden("didfuse", "didfuse", ("didfuse/Encoder_weight_IJCAI.pkl", "didfuse/Decoder_weight_IJCAI.pkl", "didfuse")),
    Golden("didfuse", "didfuse", out="out_average", options={"rule": "average"}),
    Golden("didfuse", "didfuse", out="out_l1norm", options={"rule": "l1norm"}),
    Golden("sdnet", "sdnet", ("sdnet/IRVIS.model-10.index",)),
    Golden("umfusion", "umfusion"),
    Golden("defusion", "defusion", to_unit=luma, tolerance=2e-5, relative=True),
    Golden("reconet", "reconet", ("reconet/params.pth",)),
    Golden("reconet", "reconet_plus", options={"variant": "plus"}),
    Golden("reconet", "reconet_plus", out="out_init_mean", options={"variant": "plus", "start": "mean"}),
    Golden("u2fusion", "u2fusion", ("u2fusion/model.ckpt.index",)),
    Golden("u2fusion", "u2fusion", out="out_irfirst", options={"ir_first": True}),
    Golden("tardal", "tardal", ("tardal/tardal.pt",)),
    Golden("tardal", "tardal", ("tardal/tardal.pt",), out="out_trainbn", options={"statistics": "image"}),
)
FILES = [(row, file) for row in GOLDEN for file in (f"golden/{row.folder}/state.safetensors", *(f"weights/{w}" for w in row.weights))]
TRAINED = [name for name in METHODS if find_method(name).read is not None]  # all but the sources and their mean


def pairs(shared, row: Golden):
    "(ir, vi, official output) of the three cases; the last one has odd sides."
    golden = np.load(shared / "golden" / row.folder / "io.npz")
    return [tuple(torch.from_numpy(golden[f"{name}{i}"]) for name in ("ir", "vi", row.out)) for i in range(3)]


@pytest.mark.shared
@pytest.mark.parametrize("row, file", FILES, ids=[f"{row.method}-{row.out}-{file.rpartition('/')[2]}" for row, file in FILES])
def test_official_outputs(shared, row, file):
    "The official weights, in every form that we have, give the official raw outputs."
    net = load_fusion(row.method, shared / file, "cpu", **row.options)
    for ir, vi, out in pairs(shared, row):
        expected = row.to_unit(out)
        with torch.no_grad():
            raw = net(ir, vi)
        atol = row.tolerance * (expected.abs().max().item() if row.relative else 1)
        torch.testing.assert_close(raw, expected, rtol=0, atol=atol)
        torch.testing.assert_close(fuse(net, ir, vi), expected.clamp(0, 1), rtol=0, atol=atol)


@pytest.mark.shared
@pytest.mark.parametrize("row", [row for row in GOLDEN if row.method != "defusion"], ids=lambda row: f"{row.method}-{row.out}")
def test_engines_agree(shared, row):
    "Folded, in ONNX Runtime, and either in strips: 1e-4 before rounding (relative where the golden is), one gray level after it."
    ir, vi = (image[..., :70, :48] for image in pairs(shared, row)[0][:2])
    net = load_fusion(row.method, shared / "golden" / row.folder / "state.safetensors", "cpu", **row.options)
    with torch.no_grad():
        expected = net(ir, vi)
    for engine in ("torch", "onnx"):
        built = build_engine(net, engine)
        for fused in (built(ir, vi), _in_strips(built, ir, vi, pixels=0)):
            atol = 1e-4 * (expected.abs().max().item() if row.relative else 1)
            torch.testing.assert_close(fused, expected, rtol=0, atol=atol)
            assert (to_uint8(fused[0]).int() - to_uint8(expected[0]).int()).abs().max() <= 1


@pytest.mark.shared
@pytest.mark.parametrize("row", GOLDEN, ids=[f"{row.method}-{row.out}" for row in GOLDEN])
def test_wrong_checkpoints(shared, tmp_path, row):
    "One tensor too few, one too many and one of another shape are named, all at once."
    official = load_file(shared / "golden" / row.folder / "state.safetensors")
    names = sorted(name for name, tensor in official.items() if tensor.ndim > 1)
    wrong = {name: tensor for name, tensor in official.items() if name != names[0]}
    wrong |= {"surplus": torch.zeros(1), names[1]: torch.zeros(*official[names[1]].shape[:-1], official[names[1]].shape[-1] + 1)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(CafError, match=r"wrong\.safetensors: the tensors do not fit the network: missing: .*; unexpected: .*; of another shape: "):
        load_fusion(row.method, tmp_path / "wrong.safetensors", **row.options)


@pytest.mark.shared
@pytest.mark.parametrize("row", GOLDEN, ids=[f"{row.method}-{row.out}" for row in GOLDEN])
def test_weights_of_another_method(shared, row):
    "A checkpoint of somebody else is called by its method, and leads to no KeyError from a converter."
    other = "tardal" if row.method != "tardal" else "reconet"
    with pytest.raises(CafError, match=f"this is a {find_method(other).title} checkpoint"):
        load_fusion(row.method, shared / "golden" / other / "state.safetensors", **row.options)


@pytest.mark.parametrize("method", TRAINED)
def test_own_format(tmp_path, method):
    "What we save, we load, and sizes that no method was made for go through, odd ones among them."
    torch.manual_seed(0)
    net = build_network(method)
    save_fusion(tmp_path / "own.safetensors", net, {})
    loaded = load_fusion(method, tmp_path / "own.safetensors", "cpu")
    for h, w in ((37, 50), (33, 17)):
        ir, vi = torch.rand(2, 2, 1, h, w, generator=torch.Generator().manual_seed(h))
        fused = fuse(loaded, ir, vi)
        torch.testing.assert_close(fused, fuse(net, ir, vi), rtol=0, atol=1e-5)
        torch.testing.assert_close(fuse(loaded, ir[:1], vi[:1]), fused[:1], rtol=0, atol=1e-5)  # no picture depends on its neighbours


def smoke(recipe):
    "The recipe in 20 steps on one and the same batch: with new data in each, their differences would hide a slow start."
    return recipe._replace(epochs=20, batch_size=2, crop=None)


def ends(losses):
    "The mean loss of the first and of the last quarter."
    quarter = len(losses) // 4
    return sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter


SCENES = list(SynthScenes(2, 32, seed=0))
LARGE = "defusion", "umfusion", "u2fusion"  # seconds a training: their own loss is tried in `make test`, the rest in `make test-all`


@pytest.mark.parametrize("method", [pytest.param(name, marks=[pytest.mark.long] * (name == "defusion")) for name in TRAINED if name != "caf"])
def test_trains_with_its_own_loss(method):
    "Twenty steps of every stage of the published recipe: finite, falling, and the network moves."
    torch.manual_seed(0)
    net = build_network(method)
    for number, recipe in enumerate(find_method(method).recipe):
        before = [p.detach().clone() for p in net.parameters()]
        losses = train_fusion(net, SCENES, smoke(recipe), progress=False).losses
        first, last = ends(losses)
        assert len(losses) == 20 and np.isfinite(losses).all()
        assert last < first, f"stage {number}: {losses}"
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert find_method(method).recipe
    assert fuse(net, SCENES[0].ir, luma(SCENES[0].vi)).isfinite().all()


@pytest.fixture(scope="module")
def space():
    "The released variant: its perceptual terms look at one layer of VGG, where the paper's look at thirteen."
    return LossSpace("released")


@pytest.mark.parametrize("method", [pytest.param(name, marks=[pytest.mark.long] * (name in LARGE)) for name in TRAINED])
def test_trains_with_the_loss_of_the_paper(method, space):
    "Twenty steps with a beta in place of its own loss: what the paper calls X_p."
    torch.manual_seed(0)
    net, beta = build_network(method), torch.full((len(TERMS),), 1 / len(TERMS))
    recipe = caf_recipe(space, beta, FusionSettings(epochs=20, batch_size=2, lr=1e-3))
    losses = train_fusion(net, SCENES, recipe, progress=False).losses
    first, last = ends(losses)
    assert len(losses) == 20 and np.isfinite(losses).all() and last < first, losses


@pytest.mark.parametrize("method", [pytest.param(name, marks=[pytest.mark.long] * (name in LARGE)) for name in TRAINED if name != "caf"])
def test_a_loss_is_searched_through_its_network(method):
    "One step of Algorithm 1 moves beta: the detector's loss reaches it through the network, whatever layers that has besides."
    data = Data(name="m3fd", settings=DataSettings(source="embedded", size=64, train=2, val=2, test=2))
    settings = SearchSettings(epochs=1, batch_size=2, lr_fusion=1e-3, lr_task=1e-3)
    beta = torch.tensor(list(Search(data=data, settings=settings, detector=Profile.named("smoke").detector, network=method).run().beta.values()))
    assert beta.sum().item() == pytest.approx(1, abs=1e-5) and beta.std() > 1e-3


def test_the_table_is_measured():
    "The parameters that the notes of the reference data count."
    table = method_table()
    official = {"caf": 148_321, "didfuse": 260_935, "sdnet": 67_091, "umfusion": 629_253, "defusion": 7_874_473 - 435, "reconet": 7_527,
                "u2fusion": 659_217, "tardal": 296_577}
    assert table.parameters.to_dict() == official # 435 of DeFusion belong to a layer that its code never uses
    assert table.gflops.gt(0).all() and table.page.str.startswith("https://").all() and table.licence.ne("").all()


@pytest.mark.shared
def test_didfuse_returns_what_it_encoded(shared):
    "The auto-encoder without fusion, on both sources."
    net = load_fusion("didfuse", shared / "weights/didfuse", "cpu")
    golden = np.load(shared / "golden/didfuse/io.npz")
    for i in range(3):
        for source in ("ir", "vi"):
            with torch.no_grad():
                again = net.decoder(net.encoder(torch.from_numpy(golden[f"{source}{i}"])))
            torch.testing.assert_close(again, torch.from_numpy(golden[f"recon_{source}{i}"]), rtol=0, atol=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("variant, folder", [("v0", "reconet"), ("plus", "reconet_plus")])
def test_reconet_in_every_round(shared, variant, folder):
    "The guess and both attention maps after each of the three rounds."
    net = load_fusion("reconet", shared / "golden" / folder / "state.safetensors", "cpu", variant=variant)
    golden = np.load(shared / "golden" / folder / "io.npz")
    for i in range(3):
        with torch.no_grad():
            rounds = net.recur(*(torch.from_numpy(golden[f"{name}{i}"]) for name in ("ir", "vi")))
        for k, parts in enumerate(rounds, 1):
            for part, name in zip(parts, ("f", "attir", "attvi"), strict=True):
                torch.testing.assert_close(part, torch.from_numpy(golden[f"{name}{k}_case{i}"]), rtol=0, atol=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("span, expected", [(255., 0.0041), (1., 0.762)])
def test_umfusion_measures_structure_as_its_trainer_does(shared, span, expected):
    "1 - MSSSIM of both sources as the official class gives it, at the range that the trainer uses and at the right one."
    ir, vi = (read_image(shared / f"data/tno/{source}/01.png")[None, :1, :256, :256] for source in ("ir", "vi"))
    assert 1 - ms_ssim(ir, vi, span).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.shared
def test_defusion_takes_apart(shared):
    "The common and the unique images, from a file with all 676 official names."
    folder = shared / "golden/defusion"
    official = load_file(folder / "state.safetensors")
    official |= {alias: official[name] for alias, name in json.loads((folder / "aliases.json").read_text()).items()}
    assert len(official) == 676
    net = build_network("defusion").eval()
    load_tensors(net, find_method("defusion").convert(official))
    golden = np.load(folder / "io.npz")
    for i in range(3):
        sources = (torch.from_numpy(golden[f"{name}{i}"]).expand(-1, 3, -1, -1) for name in ("ir", "vi"))
        with torch.no_grad():
            parts = net.decompose(*(torch.nn.functional.pad(image, (16,) * 4, mode="reflect") for image in sources))
        for part, name in zip(parts, ("common", "upper", "lower", "out"), strict=True):
            expected = torch.from_numpy(golden[f"{name}{i}"])
            torch.testing.assert_close(part[..., 16:-16, 16:-16], expected, rtol=0, atol=2e-5 * expected.max().item())


@pytest.mark.parametrize("method, options", [("didfuse", {"rule": rule}) for rule in ("sum", "average", "l1norm")] + [
    ("sdnet", {}), ("umfusion", {}), ("u2fusion", {}), ("reconet", {}), ("reconet", {"variant": "plus"}), ("tardal", {})])
def test_strips_fit_together(method, options):
    "A network that states its reach gives in strips what it gives in one piece."
    torch.manual_seed(0)
    net = build_network(method, **options).eval()
    ir, vi = torch.rand(2, 1, 1, 5 * net.reach + 3, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fusion._in_strips(net, ir, vi, pixels=0), net(ir, vi), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] if m == "defusion" else []) for m in METHODS if m not in ("ir", "vi", "mean", "caf", "tardal")])
def test_onnx_of_any_size(method, tmp_path):
    "`to_onnx` compares pictures of another size in ONNX Runtime with the network; caf and tardal are in nbs/zoo/export.ipynb."
    torch.manual_seed(0)
    assert to_onnx(build_network(method), tmp_path / "net.onnx", 1e-5) < 1e-5
