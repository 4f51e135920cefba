"""The metrics against published values, their properties, their limits, and `caf-eval` from the outside."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

from caf_nb.cli import eval_app
from caf_nb.core import CafError
from caf_nb.data import read_image, write_png
from caf_nb.metrics import CONVENTIONS, METRICS, average_gradient, blur_separable, blur_window, correlation_coefficient, edge_transfer, entropy, evaluate_fusion, measure, multiscale_structural_similarity, mutual_information, peak_signal_to_noise_ratio, plain_metrics, spatial_frequency, standard_deviation, structural_similarity, sum_of_correlations_of_differences, visual_information_fidelity, visual_information_fidelity_for_fusion  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [name for name, metric in METRICS.items() if metric.sources]

# ---------------------------------------------------------------- reference values of independent tools


def reference(shared):
    "The rows of the reference file with their images, read once."
    root = shared / "golden/metrics"
    images = {p.relative_to(root).with_suffix("").as_posix(): read_image(p) for p in root.rglob("*") if p.suffix in (".png", ".jpg")}
    for row in pd.read_csv(root / "reference.csv", dtype={"image": str}).itertuples():
        yield row, *(images[f"{row.set}/{kind}/{row.image}"] for kind in (f"fused/{row.method}", "ir", "vi"))


@pytest.mark.shared
def test_every_reference_value(shared):
    "MI, SD, VIF and SCD within the tolerance of the file; rows without one (VIFB prints five digits) within 1e-4 all the same."
    wrong, seen = [], 0
    for row, fused, ir, vi in reference(shared):
        name, _, legacy = row.metric.partition("_")
        tool = "vifb" if row.set == "vifb" else "evaluation-for-image-fusion-2022" if legacy else "caf_nb"
        ours = measure(name, fused, ir, vi, CONVENTIONS[tool]).item()
        seen += 1
        tolerance = 1e-4 if np.isnan(row.rel_tolerance) else row.rel_tolerance
        if abs(ours / row.value - 1) > tolerance: wrong.append((row.set, row.image, row.method, row.metric, row.value, ours, ours / row.value - 1))
    assert seen == 114 and not wrong, "\n".join(map(str, wrong))


@pytest.mark.shared
def test_the_same_values_from_folders(shared):
    "`evaluate_fusion` over the folders of the reference, two methods at once."
    root = shared / "golden/metrics/tno"
    frame = evaluate_fusion(root / "ir", root / "vi", [root / "fused/SDNet", root / "fused/U2Fusion"], progress=False)
    expected = pd.read_csv(shared / "golden/metrics/reference.csv", dtype={"image": str}).query("set == 'tno'")
    both = frame.merge(expected, on=["image", "method", "metric"])
    assert len(both) == len(frame) == 3 * 2 * 4
    np.testing.assert_allclose(both.value_x, both.value_y, rtol=1e-4)


@pytest.mark.shared
def test_plain_versions_agree_with_the_reference(shared):
    "The oracle of the other tests is itself right."
    for row, *images in reference(shared):
        if row.set == "tno" and row.image == "05" and "legacy" not in row.metric:
            values = plain_metrics(*((255 * x[0]).round().numpy() for x in images), blur_separable)
            assert values[row.metric] == pytest.approx(row.value, rel=1e-9 if row.metric != "VIF" else 1e-6)


# ---------------------------------------------------------------- the paper's Table 3


@pytest.mark.shared
@pytest.mark.parametrize("stem, mi, vif, viff", [("00512", 1.449, 0.812, 0.656), ("01670", 0.648, 0.550, 0.499)])
def test_published_results_of_caf(shared, stem, mi, vif, viff):
    "MI in the convention `paper`, and the two VIF beside the 0.983 that the paper prints: neither reaches it."
    images = [read_image(shared / "data/m3fd" / kind / f"{stem}.png") for kind in ("fused_official_det", "ir", "vi")]
    assert measure("MI", *images, CONVENTIONS["paper"]).item() == pytest.approx(mi, abs=5e-4)
    assert measure("VIF", *images).item() == pytest.approx(vif, abs=5e-4) and vif < 0.983
    assert measure("VIFF", *images).item() == pytest.approx(viff, abs=5e-4) and viff < 0.983


def plain_viff(f, x, y):
    "VIFF of one image, written plainly."
    bands = []
    for size in (17, 9, 5, 3):
        kernel = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * (size / 5) ** 2))
        kernel /= kernel.sum()
        if size < 17: f, x, y = (blur_window(z, kernel)[::2, ::2] for z in (f, x, y))
        mean, kept, own = blur_window(f, kernel), [], []
        for z in (x, y):
            var, cov = blur_window(z * z, kernel) - blur_window(z, kernel) ** 2, blur_window(f * z, kernel) - mean * blur_window(z, kernel)
            gain = np.maximum(cov / var, 0)
            rest = blur_window(f * f, kernel) - mean**2 - gain * cov
            kept.append(np.log(1 + gain**2 * var / (rest + 0.005 * 255**2)))
            own.append(np.log(1 + var / (0.005 * 255**2)))
        bands.append(np.where(own[0] > own[1], *kept).sum() / np.maximum(*own).sum())
    return (bands[0] + 0.15 * bands[2] + bands[3]) / 2.15


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_viff_equals_the_plain_version(seed):
    x, y, z = (torch.rand(1, 48, 61, generator=torch.Generator().manual_seed(seed + i)) for i in range(3))
    f, (x, y) = ((x + 2 * y + z) / 4), (x, y / 2)
    assert visual_information_fidelity_for_fusion(f, x, y).item() == pytest.approx(plain_viff(*(255 * v[0].double().numpy() for v in (f, x, y))), rel=1e-5)


# ---------------------------------------------------------------- properties

settings.register_profile("metrics", deadline=None)  # the machine may be busy
settings.load_profile("metrics")

SIDES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def picture(shape):
    "Gray levels with many repeats, or all different."
    return st.one_of(arrays(np.uint8, (1, *shape)), arrays(np.uint8, (1, *shape), elements=st.sampled_from([0, 1, 128, 254, 255]))).map(torch.from_numpy)


def pictures(n, sides=SIDES): return sides.flatmap(lambda shape: st.tuples(*[picture(shape)] * n))


def noise(seed, *shape):
    "Textured pictures of a size that VIF can take; hypothesis chooses the seed."
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


SEEDS = st.integers(0, 2**32 - 1)


@given(pictures(2))
def test_mi_is_symmetric_bounded_and_non_negative(xy):
    x, y = xy
    there, back = mutual_information(x, y).item(), mutual_information(y, x).item()
    assert there == pytest.approx(back, abs=1e-9)
    assert 0 <= there <= min(entropy(x).item(), entropy(y).item()) + 1e-9


@given(pictures(1))
def test_mi_with_itself_is_the_entropy(x):
    assert mutual_information(*x, *x).item() == pytest.approx(entropy(*x).item(), abs=1e-9)


@given(pictures(3))
def test_conventions_of_mi(images):
    bits = mutual_information(*images).item()
    assert mutual_information(*images, base="e").item() == pytest.approx(bits * np.log(2), abs=1e-9)
    assert mutual_information(*images, reduce="mean").item() == pytest.approx(bits / 2, abs=1e-9)
    assert mutual_information(*images, stretch=True).item() == pytest.approx(bits, abs=1e-9)  # a renaming of levels
    assert mutual_information(*images, legacy_uint8=True).item() >= bits - 1e-9  # merging hides joint entropy only


@given(pictures(1), st.floats(0, 1))
def test_sd_scales_with_contrast(x, c):
    x = x[0] / 255
    assert standard_deviation(c * x).item() == pytest.approx(c * standard_deviation(x).item(), rel=1e-5, abs=1e-4)


@given(pictures(1))
def test_sd_is_numpys_and_legacy_sd_is_smaller(x):
    levels = x[0].double().numpy()
    assert standard_deviation(*x).item() == pytest.approx(levels.std(), rel=1e-5, abs=1e-4)
    assert standard_deviation(*x, legacy_uint8=True).item() <= min(255**0.5, levels.std() + 0.5) + 1e-4


@given(pictures(3))
def test_scd_lies_within_two(images):
    assert -2 <= sum_of_correlations_of_differences(*images).item() <= 2


@given(pictures(3))
def test_flips_change_nothing(images):
    "Every metric that does not subsample."
    for axis in (-1, -2):
        flipped = [x.flip(axis) for x in images]
        for metric in (mutual_information, standard_deviation, sum_of_correlations_of_differences, entropy, spatial_frequency, correlation_coefficient):
            given_, turned = ((x if METRICS[name_of(metric)].sources else x[:1]) for x in (images, flipped))
            assert metric(*turned).item() == pytest.approx(metric(*given_).item(), rel=1e-4, abs=1e-4)


def name_of(call): return next(name for name, metric in METRICS.items() if metric.call is call)


@settings(max_examples=30)
@given(SEEDS, st.floats(0.01, 1), st.sampled_from([41, 49, 57]))
def test_vif(seed, contrast, side):
    "One for a copy; never negative; flips change nothing where every scale is of odd size."
    x, y = (contrast * noise(seed + i, 1, side, side) for i in range(2))
    assert visual_information_fidelity(x, x).item() == pytest.approx(1, abs=1e-5)
    both = visual_information_fidelity((x + y) / 2, x, y).item()
    assert both >= 0
    for axis in (-1, -2):
        assert visual_information_fidelity(*((z).flip(axis) for z in ((x + y) / 2, x, y))).item() == pytest.approx(both, rel=1e-4)


@settings(max_examples=10)
@given(SEEDS)
def test_four_metrics_equal_the_plain_versions(seed):
    f, x, y = ((255 * noise(seed + i, 1, 48, 61)).round() for i in range(3))
    f = ((x + 2 * y + f) / 4).round()
    for blur in (blur_window, blur_separable):
        for name, value in plain_metrics(f[0].numpy(), x[0].numpy(), y[0].numpy(), blur).items():
            assert measure(name, f / 255, x / 255, y / 255).item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


# ---------------------------------------------------------------- images that are not pictures

MINIMUM = {"AG": 2, "VIF": 41, "VIFF": 41, "SSIM": 11, "MS-SSIM": 176}


@pytest.mark.parametrize("level", [0.0, 0.1, 100 / 255, 1.0])
def test_constant_images(level):
    x = torch.full((1, 1, 176, 179), level)
    expected = {"MI": 0, "SD": 0, "VIF": 2, "SCD": 0, "EN": 0, "AG": 0, "SF": 0, "CC": 0, "PSNR": np.inf, "SSIM": 2, "MS-SSIM": 2, "VIFF": 1}
    for name, value in expected.items():
        assert measure(name, x, x, x).item() == pytest.approx(value, abs=2e-3 if name == "MS-SSIM" else 1e-5), name  # torchmetrics cancels in float32
    for name in METRICS: assert not measure(name, x, x.flip(-1) / 2, noise(0, *x.shape)).isnan().any(), name
    assert standard_deviation(x, legacy_uint8=True).item() == 0


@pytest.mark.parametrize("name", METRICS)
def test_one_pixel(name):
    x = torch.tensor([[[0.25]]]), torch.tensor([[[0.5]]]), torch.tensor([[[1.]]])
    if name in MINIMUM:
        with pytest.raises(CafError, match=f"at least {MINIMUM[name]}x{MINIMUM[name]}"): measure(name, *x)
    else: assert measure(name, *x).isfinite().all()


@pytest.mark.parametrize("name, place", [(name, place) for name in METRICS for place in range(3 if name in SOURCES else 1)])
def test_refused_input(name, place):
    good = [noise(i, 1, 176, 177) for i in range(3)]
    for change, sentence in ((lambda x: x.index_fill(-1, torch.tensor(7), float("nan")), "not numbers"), (lambda x: 2 * x - 1, "Scale it to"),
                             (lambda x: 255 * x, "Scale it to"), (lambda x: x.index_fill(-1, torch.tensor(7), float("inf")), "ranges from|not numbers"),
                             (lambda x: x.long(), "uint8, or floats"), (lambda x: x.expand(2, -1, -1), "Give gray"), (lambda x: x[:, :0], "has shape|pixels")):  # fmt: skip
        images = [change(x) if i == place else x for i, x in enumerate(good)]
        with pytest.raises(CafError, match=sentence): measure(name, *images)


@pytest.mark.parametrize("name", SOURCES)
def test_unequal_sizes(name):
    with pytest.raises(CafError, match="aligned images of one size"): measure(name, *(noise(0, 1, 165, 165 + i) for i in range(3)))


def test_rounding_over_the_edge_is_no_mistake():
    assert standard_deviation(torch.tensor([[[1 + 5e-5, -5e-5]]])).item() == 127.5


def test_wrong_conventions():
    x = noise(0, 1, 48, 48)
    for call, word in ((lambda: mutual_information(x, x, base=10), "base"), (lambda: mutual_information(x, x, reduce="max"), "reduce"),
                       (lambda: standard_deviation(x, channels="y"), "channels"), (lambda: standard_deviation(x.expand(3, -1, -1), gray="matlab"), "gray"),
                       (lambda: visual_information_fidelity(x), "no source"), (lambda: edge_transfer(x), "no source"),
                       (lambda: peak_signal_to_noise_ratio(x), "no source")):  # fmt: skip
        with pytest.raises(CafError, match=word): call()


def test_methods_and_batch_broadcast():
    "Methods stacked in front of the batch give what each pair gives alone, for every metric and both ways with channels."
    fused, ir, vi = noise(0, 2, 3, 3, 176, 179), noise(1, 3, 1, 176, 179), noise(2, 3, 3, 176, 179)
    for convention in (CONVENTIONS["caf_nb"], CONVENTIONS["vifb"]):
        for name in METRICS:
            together = measure(name, fused, ir, vi, convention)
            assert together.shape == (2, 3)
            assert together[1, 2].item() == pytest.approx(measure(name, fused[1, 2], ir[2], vi[2], convention).item(), rel=1e-5), name


def test_flat_functions_have_no_gradient_surprises():
    "Similarities of torchmetrics are symmetric here too."
    x, y = noise(0, 1, 176, 179), noise(1, 1, 176, 179)
    for metric in (structural_similarity, multiscale_structural_similarity): assert metric(x, y).item() == pytest.approx(metric(y, x).item(), rel=1e-4)
    assert average_gradient(x).item() == pytest.approx(average_gradient(x.flip(-1)).item(), rel=1e-5)


# ---------------------------------------------------------------- memory

MEMORY = """
    import re, torch
    from caf_nb.metrics import evaluate_fusion
    g = torch.Generator().manual_seed(0)
    ir, vi, a, b, c = (torch.randint(0, 256, (1, 1, 2048, 2048), generator=g, dtype=torch.uint8) for _ in range(5))
    frame = evaluate_fusion(ir, vi, {"a": a, "b": b, "c": c}, device="cpu", progress=False)
    assert frame.value.notna().all()
    print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_megapixels_in_a_gigabyte_and_a_half():
    "The paper's metrics for three methods of 2048x2048 pixels, in a process of its own."
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) * 1024 < 1.5e9


# ---------------------------------------------------------------- caf-eval


@pytest.fixture
def folder(tmp_path):
    "ir, vi and two methods with three pairs of 48x64 pixels; the second method in colour."
    for kind, channels in (("ir", 1), ("vi", 3), ("one", 1), ("two", 3)):
        (tmp_path / kind).mkdir()
        for i in range(3): write_png(tmp_path / kind / f"{i}.png", noise(7 * i + channels, channels, 48, 64))
    return tmp_path


def caf_eval(folder, *more, fused=("one", "two"), out="metrics.csv"):
    words = ["--ir", folder / "ir", "--vi", folder / "vi", "--fused", *(folder / f for f in fused), "--out", folder / out, *more]
    run = CliRunner().invoke(eval_app, [str(w) for w in words])
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    assert "Traceback" not in run.output
    return run


def test_caf_eval(folder):
    run = caf_eval(folder)
    assert run.exit_code == 0, run.stderr
    frame = pd.read_csv(folder / "metrics.csv", dtype={"image": str})
    assert list(frame.columns) == ["image", "method", "metric", "value"] and len(frame) == 3 * 2 * 4
    expected = evaluate_fusion(folder / "ir", folder / "vi", [folder / "one", folder / "two"], progress=False)
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-9)
    assert "one" in run.stdout and "VIF" in run.stdout  # the averages


def test_caf_eval_repeated_option_and_conventions(folder):
    run = caf_eval(folder, "--fused", folder / "two", "--metrics", "MI,EN", "--convention", "cddfuse", fused=("one",))
    assert run.exit_code == 0, run.stderr
    frame = pd.read_csv(folder / "metrics.csv")
    assert list(frame.metric.unique()) == ["MI", "EN"] and list(frame.method.unique()) == ["one", "two"]
    bits = evaluate_fusion(folder / "ir", folder / "vi", folder / "one", ["MI"], progress=False).value
    np.testing.assert_allclose(frame.query("method == 'one' and metric == 'MI'").value, bits * np.log(2), rtol=1e-9)


def test_caf_eval_goes_on_after_a_damaged_file(folder):
    (folder / "two/1.png").write_bytes((folder / "two/1.png").read_bytes()[:300])
    run = caf_eval(folder)
    assert run.exit_code == 1 and "caf-eval: 1: not measured: " in run.stderr and "two/1.png: cannot be decoded" in run.stderr
    frame = pd.read_csv(folder / "metrics.csv", dtype={"image": str})
    assert set(frame[frame.value.isna()].image) == {"1"} and frame.value.notna().sum() == 2 * 2 * 4


def test_caf_eval_says_what_it_leaves_out(folder):
    (folder / "one/2.png").unlink()
    run = caf_eval(folder)
    assert run.exit_code == 0 and "caf-eval: 1 of 3 images are not in every folder and are left out: 2" in run.stderr


@pytest.mark.parametrize("more, changes, sentence", [
    (("--metrics", "MI,FMI"), {}, "the metric is 'FMI'. Choose one of 'MI', "),
    (("--convention", "mine"), {}, "the convention is 'mine'. Choose one of 'caf_nb', "),
    (("--device", "abacus"), {}, "device 'abacus' cannot be used here"),
    ((), {"fused": ("absent",)}, "absent: there is no such folder"),
    ((), {"fused": ("one", "one")}, "have one name"),
    ((), {"out": "absent/metrics.csv"}, "absent/metrics.csv: cannot be written"),
    ((), {"out": "ir"}, "ir: cannot be written"),
])  # fmt: skip
def test_caf_eval_refuses_in_one_sentence(folder, more, changes, sentence):
    run = caf_eval(folder, *more, **changes)
    assert run.exit_code == (2 if more else 1) and run.stdout == ""
    said = [line for line in run.stderr.splitlines() if line.startswith("caf-eval: ")]
    assert len(said) == len(run.stderr.splitlines()) == 1 and sentence in said[0]


def test_caf_eval_help_needs_no_pytorch():
    code = "import sys; from caf_nb.cli import eval_app; eval_app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and all(option in run.stdout for option in ("--ir", "--vi", "--fused", "--out", "--metrics", "--convention"))


# ---------------------------------------------------------------- Figure 7


@pytest.mark.slow
def test_figure7(tmp_path):
    "The paper notebook on folders: every image of every set and method, and pictures that were fused elsewhere."
    for i in range(4):
        for kind, channels in (("data/tno/ir", 1), ("data/tno/vi", 3), ("fused/mine/tno", 1)):
            write_png(made(tmp_path / kind) / f"{i}.png", noise(9 * i + channels, channels, 48, 64))
    parameters = {"out": tmp_path / "out", "data_root": tmp_path / "data", "fused_root": tmp_path / "fused", "methods": "vi,ir", "datasets": "tno", "at_most": 3}
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "nbs/figure7.ipynb", str(tmp_path / "figure7.ipynb"), "-k", "python3", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    frame = pd.read_csv(tmp_path / "out/figure7.csv", dtype={"image": str})
    assert len(frame) == 3 * 3 * 4 and set(frame.method) == {"vi", "ir", "mine"} and frame.value.notna().all()
    copies = frame.query("method == 'ir' and metric == 'MI'").set_index("image").value  # a copy of ir: its entropy, and what vi tells about it
    for image, value in copies.items():
        ir, vi = (read_image(tmp_path / "data/tno" / kind / f"{image}.png") for kind in ("ir", "vi"))
        assert value == pytest.approx((entropy(ir) + mutual_information(ir, vi)).item(), rel=1e-9)
    assert (tmp_path / "out/figure7.png").is_file()


def made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder
