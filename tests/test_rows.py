"""A row of a table is one entry of the registry."""

import pytest

from caf_nb.config import DataSettings, Profile
from caf_nb.core import CafError
from caf_nb.losses import TERMS
from caf_nb.report import compare, show_insets
from caf_nb.rows import ROWS, Row, Setup, Style, check, in_order, own_weights, row_style, table1, weighted
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
    with pytest.raises(CafError, match="TarDAL: no tardal.safetensors|TarDAL"): check(setup, ["tardal_gray"])
    check(setup.model_copy(update={"trained": ("tardal",)}), ["tardal_gray"])
    with pytest.raises(CafError, match="no row 'caf_brightest'"): check(setup, ["caf_brightest"])


def test_every_method_has_its_family(setup):
    for name in ("didfuse", "sdnet", "umfusion", "defusion", "reconet", "u2fusion", "tardal"):
        for suffix in ("p", "h", "r", "a"):
            row = ROWS[f"{name}_{suffix}"]
            assert row.network == name and row.style.colour == ROWS[name].style.colour
            assert setup.model("detection", row.name).network == name
