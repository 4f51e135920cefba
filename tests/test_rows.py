"""A row of a table is one entry of the registry, and two rows differ in nothing but what their names say."""

from itertools import combinations

import pytest

from caf_nb.config import DataSettings, Profile
from caf_nb.core import CafError
from caf_nb.losses import TERMS
from caf_nb.report import compare, show_insets
from caf_nb.rows import ROWS, Row, Setup, Style, check, in_order, left_out, own_weights, row_style, table1, table2, table3, weighted
from caf_nb.stages import FinetuneDetector, TrainFusion


@pytest.fixture
def setup(tmp_path) -> Setup:
    smoke = Profile.named("smoke")
    tiny = DataSettings(source="embedded", size=64, train=4, val=4, test=4)
    return Setup(profile=smoke.model_copy(update={"data": tiny}), cache=str(tmp_path / "cache"))


@pytest.fixture
def brightest(monkeypatch) -> Row:
    "The one edit: an entry with a name, a title, a style and a way to fuse."
    only_brightest = tuple(float(name == "l1_max") for name in TERMS)
    row = Row("caf_brightest", Style("CAF (brightest)", "#123456", "x"), weighted(lambda seed: only_brightest))
    monkeypatch.setitem(ROWS, row.name, row)
    return row


def test_an_entry_is_a_row_of_a_table(setup, brightest):
    stages = table1(setup, ["ir", "caf_brightest"])  # with its check
    assert set(stages) == {(d, r) for d in ("m3fd", "multispectral") for r in ("ir", "caf_brightest")}
    stage, model = stages["m3fd", "caf_brightest"], setup.model("detection", "caf_brightest")
    assert isinstance(stage, FinetuneDetector) and isinstance(model, TrainFusion)
    assert stage.fused.model.loss.beta == model.loss.beta == tuple(float(name == "l1_max") for name in TERMS)


def test_an_entry_is_in_tables_and_plots(setup, brightest):
    compared = compare(1, {("m3fd", "caf_brightest"): {"mAP@.5": 50.}}, setup.profile)
    assert compared.set_index(["dataset", "method", "metric"]).ours["m3fd", "caf_brightest", "mAP@.5"] == 50
    assert in_order(["caf_brightest", "ir", "caf"]) == ["ir", "caf", "caf_brightest"]
    assert row_style("caf_brightest") == brightest.style
    scene = setup.data("m3fd").split("test")[0]
    assert [ax.get_title() for ax in show_insets({"vi": scene.vi, "caf_brightest": scene.vi})] == ["Visible", "CAF (brightest)"]


def test_an_entry_is_checked(setup, monkeypatch):
    monkeypatch.setitem(ROWS, "tardal_gray", Row("tardal_gray", Style("TarDAL, gray", "#ece133", "*"), own_weights, "tardal"))
    with pytest.raises(CafError, match="no row can be computed: no tardal/tardal.pt or tardal.safetensors"): check(setup, ["tardal_gray"])
    assert check(setup, ["tardal_gray", "ir"]) == ["ir"] and list(left_out(setup, ["tardal_gray", "ir"])) == ["tardal_gray"]
    assert check(setup.model_copy(update={"without": ("ir",)}), ["ir", "vi"]) == ["vi"]
    check(setup.model_copy(update={"trained": ("tardal",)}), ["tardal_gray"])
    with pytest.raises(CafError, match="no row 'caf_brightest'"): check(setup, ["caf_brightest"])


def test_every_method_has_its_family(setup):
    for name in ("didfuse", "sdnet", "umfusion", "defusion", "reconet", "u2fusion", "tardal"):
        for suffix in ("p", "h", "r", "a"):
            row = ROWS[f"{name}_{suffix}"]
            assert row.network == name and row.style.colour == ROWS[name].style.colour
            assert setup.model("detection", row.name).network == name


TABLES = [table1, table2, table3]
# the last words of a name, and what they say of the stages: everything below these fields
OF_ROW = {"joint": ("kind", "data", "lr_task", "weight", "detector", "segmenter", "start"), "whole": ("settings.crop",),
          "oracle": ("kind", "data", "lr_task", "weight", "detector", "segmenter", "start", "settings.epochs", "settings.lr"),
          "warm": ("loss.settings.warmup_fusion",), "adam": ("loss.settings.warmup_fusion", "loss.settings.unrolled_by"),
          "unlabelled": ("loss.settings", "loss.labels"), "pixels": ("loss.settings",), "pixels_a": ("loss.settings",), "steady": ("loss.settings.val_batch_size",), "swapped": ("loss.data", "loss.detector", "loss.segmenter", "loss.start")}


def flat(value, name: str = "") -> dict[str, object]:
    "The fields of a configuration by their path."
    if not isinstance(value, dict): return {name: value}
    return {path: leaf for key, part in value.items() for path, leaf in flat(part, f"{name}.{key}".strip(".")).items()}


def how(row: str) -> tuple[str, str, str]:
    "What the name of a row says: network, loss, and a change of either."
    network, _, suffix = row.partition("_")
    own = {"caf": "searched"}.get(network, "source" if network in ("ir", "vi", "mean") else "own")
    loss = {"": own, "p": "searched", "h": "given", "r": "given", "a": "given", "oracle": "given", "effects": "effects", "evolved": "evolved",
            "pixels": "pixels", "pixels_a": "pixels"}.get(suffix, "searched")
    return network, loss, suffix


def named(a: str, b: str) -> tuple[str, ...]:
    "The fields of the model in which two rows may differ."
    (net_a, loss_a, more_a), (net_b, loss_b, more_b) = how(a), how(b)
    fields = OF_ROW.get(more_a, ()) + OF_ROW.get(more_b, ())
    if "source" in (loss_a, loss_b): return ("",)
    if loss_a != loss_b: fields += ("loss",)
    if loss_a == loss_b == "given": fields += ("loss.beta",)
    if "own" in (loss_a, loss_b): fields += ("settings",)  # a published loss has its own
    if net_a != net_b: fields += ("network", "loss.network", "fusion_start", "loss.fusion_start")
    return fields


def unnamed(setup: Setup, table, rows) -> dict[tuple[str, str, str], set[str]]:
    "Where two rows of a table differ without saying so: (data set, row, row) -> fields."
    stages = {key: flat(stage.infra.config(uid=True, exclude_defaults=False)) for key, stage in table(setup, rows).items()}
    found = {}
    for dataset, (a, b) in ((d, pair) for d in {d for d, _ in stages} for pair in combinations(rows, 2)):
        one, other = stages[dataset, a], stages[dataset, b]
        apart = {path for path in one.keys() | other.keys() if one.get(path, "absent") != other.get(path, "absent")}
        assert apart, f"{a} and {b} are the same on {dataset}"
        allowed = tuple(f"fused.model.{field}".strip(".") for field in named(a, b))
        if more := {p for p in apart if not any(p == f or p.startswith(f"{f}.") for f in allowed)}: found[dataset, a, b] = more
    return found


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name, scenes", [("smoke", "task"), ("mini", "task"), ("mini", "loss")])
def test_two_rows_differ_in_what_their_names_say(tmp_path, table, name, scenes):
    "With `fusion_scenes=\"loss\"`, as mini was made, the scenes differ too, and the profile's note says so."
    networks = ("umfusion", "reconet", "u2fusion")
    rows = ["ir", "vi", "mean", *(r for r in ROWS if r.startswith("caf")),
            *(f"{n}{s}" for n in networks for s in ("", "_p", "_h", "_r", "_a"))]
    profile = Profile.named(name).model_copy(update={"fusion_scenes": scenes, "pilot": (500,)})
    found = unnamed(Setup(profile=profile, trained=networks, cache=str(tmp_path)), table, rows)
    if scenes == "task": assert not found
    else:
        assert {field for fields in found.values() for field in fields} == {"fused.model.data.name"}
        assert all(d == "mfnet" or "caf_swapped" in pair for d, *pair in found) and "rows without a searched loss" in profile.note
