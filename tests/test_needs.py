"""What a large run needs: found where it is, named where it is not, and its cost."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from published import TREES, write
from safetensors.torch import save_file

from caf_nb import needs as needs_module
from caf_nb.core import CafError
from caf_nb.config import Profile
from caf_nb.needs import COSTS, Need, cost_table, describe, require
from caf_nb.rows import Setup, row_needs
from caf_nb.zoo import build_network

ROWS = ("ir", "vi", "reconet", "umfusion_p", "caf", "caf_a")


@pytest.fixture(autouse=True)
def nothing_of_this_user(monkeypatch, tmp_path):
    "Splits and weights that somebody has on this machine stay out of it."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def data_root(tmp_path) -> Path:
    for name in ("m3fd", "mfnet", "multispectral", "tno", "roadscene"): TREES[name](tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def small() -> Profile:
    "The paper's profile with networks that are quickly written and read."
    paper = Profile.named("paper")
    return paper.model_copy(update={"detector": paper.detector.model_copy(update={"model": "yolov5n"}), "segmenter": paper.segmenter.model_copy(update={"model": "tiny"})})


def check(profile: Profile, data_root="", weights_root="", fused_root="", rows=None, cache="out/cache") -> list[Need]:
    setup = Setup(profile=profile, data_root=str(data_root), weights_root=str(weights_root), fused_root=str(fused_root),
                  trained=profile.trained, cache=str(cache))
    return row_needs(setup, list(dict.fromkeys((*profile.methods, *profile.ablation))) if rows is None else rows)


def states(needs: list[Need]) -> dict[str, str]: return {need.what: need.state for need in needs}


def test_an_empty_machine_is_told_everything_at_once(tmp_path):
    needs = check(Profile.named("paper"), tmp_path, tmp_path)
    with pytest.raises(CafError) as error: require(needs)
    told = str(error.value)
    for word in ("M3FD", "Multispectral", "MFNet", "TNO", "RoadScene", "github.com/JinyuanLiu-CV/TarDAL", "yolov5su.pt", "mit-b1", "vgg16-397923af.pth"): assert word in told, word
    shown = describe(Profile.named("paper"), needs)
    assert "Rows that stay empty: DIDFuse, SDNet, UMFusion, DeFusion, ReCoNet, U2Fusion, TarDAL." in shown and "github.com/dlut-dimt/ReCoNet" in shown
    assert "UMFusion" not in told
    assert all(need.remedy for need in needs if need.state != "there")
    assert not {"caf", "ir", "vi"} & {need.what.lower() for need in needs}


def test_data_are_there_if_they_can_be_read(small, data_root, tmp_path):
    def look(): return {need.what.split()[0]: need for need in check(small, data_root, "", rows=()) if need.what[:3] in ("M3F", "MFN", "Mul", "TNO", "Roa")}
    needs = look()
    assert {name: need.state for name, need in needs.items()} == {"M3FD": "warning", "Multispectral": "warning", "MFNet": "warning", "TNO": "there", "RoadScene": "warning"}
    assert needs["M3FD"].detail == f"8 pairs in {data_root / 'm3fd'}, of 4,200 published"
    (data_root / "m3fd/Vis/00000.png").write_bytes(b"\x89PNG")                                   # the first picture is cut off
    shutil.rmtree(data_root / "mfnet/labels")
    write(data_root / "multispectral/Annotations_ConvertedSummarized/000001.xml", "<annotation")  # not the first one: caf-data check finds it
    (data_root / "roadscene/cropinfrared").rename(data_root / "roadscene/infrared_cropped")
    needs = look()
    assert {name: need.state for name, need in needs.items()} == {"M3FD": "missing", "Multispectral": "warning", "MFNet": "missing", "TNO": "there", "RoadScene": "missing"}
    assert "00000.png" in needs["M3FD"].detail and "images beside labels" in needs["MFNet"].detail


def test_the_original_detector_needs_its_distribution_and_its_own_file(small):
    original = small.model_copy(update={"detector": small.detector.model_copy(update={"anchors": True})})
    found = {need.what: need for need in check(original, "", "", rows=())}
    assert "yolov5" not in {need.what for need in check(small, "", "", rows=())}
    assert (found["yolov5"].state == "there") == (importlib.util.find_spec("yolov5") is not None)
    assert found["COCO weights of the original yolov5n"].state == "missing" and "no yolov5n.pt" in found["COCO weights of the original yolov5n"].detail


@pytest.mark.slow
def test_weights_are_there_if_they_load(small, tmp_path):
    pytest.importorskip("transformers")
    from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES
    from caf_nb.tasks import Detector, Segmenter
    root = tmp_path / "weights"
    root.mkdir()
    torch.save({"model": Detector(M3FD_CLASSES, "yolov5n").net}, root / "yolov5nu.pt")
    Segmenter(MFNET_CLASSES, "tiny").save(root / "mit-tiny")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save({f"features.{name}": tensor for name, tensor in untrained_vgg().items()}, tmp_path / "hub/checkpoints/vgg16-397923af.pth")
    save_file(build_network("reconet").state_dict(), root / "reconet.safetensors")
    found = check(small, "", root, rows=ROWS)
    assert {what: state for what, state in states(found).items() if "weights" in what or what == "ReCoNet"} == {
        "COCO weights of yolov5n": "there", "ImageNet weights of SegFormer tiny": "there", "ImageNet weights of VGG-16": "there",
        "Cityscapes weights of DeepLabV3+": "warning", "ReCoNet": "there"}
    save_file(build_network("umfusion").state_dict(), root / "reconet.safetensors")              # of another method
    (root / "mit-tiny/config.json").unlink()
    found = {need.what: need for need in check(small, "", root, rows=ROWS)}
    assert (found["ReCoNet"].state, found["ImageNet weights of SegFormer tiny"].state) == ("absent", "missing") and "reconet.safetensors" in found["ReCoNet"].detail


def untrained_vgg() -> dict[str, torch.Tensor]:
    "All convolutions of a VGG-16 that nobody trained."
    from caf_nb.losses.vgg import _random_layers
    return _random_layers(0).state_dict()


def test_pictures_and_trainings_stand_in_for_weights(small, tmp_path):
    (tmp_path / "shown/reconet").mkdir(parents=True)
    trained = small.model_copy(update={"trained": ("sdnet",)})
    found = states(check(trained, "", tmp_path, tmp_path / "shown", rows=("reconet", "sdnet", "didfuse")))
    assert (found["ReCoNet"], found["SDNet"], found["DIDFuse"]) == ("there", "warning", "absent")


def test_room_is_that_of_the_folder_to_be(small, data_root, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    def need(rows): return next(n for n in check(small, data_root, "", rows=rows, cache=tmp_path / "not/yet/there") if n.what == "room for pictures")
    assert need(ROWS).state == "there" and str(tmp_path) in need(ROWS).detail
    sizes = sum(needs_module._picture_bytes(name, data_root) for name in ("m3fd", "multispectral", "mfnet"))
    assert sizes > 8 * 3 * 500
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=3 * sizes + 1))
    assert (need(ROWS[:3]).state, need(ROWS[:4]).state) == ("there", "missing")


def test_a_profile_with_embedded_data_needs_next_to_nothing(tmp_path):
    for name in ("smoke", "mini"): require(check(Profile.named(name)))
    assert "Nothing is missing." in describe(Profile.named("smoke"), check(Profile.named("smoke")))


# ---------------------------------------------------------------- cost

def test_the_cost_counts_what_is_trained(small, data_root, tmp_path):
    profile = small.model_copy(update={"data": small.data.model_copy(update={"block_size": 32})})
    setup = Setup(profile=profile.model_copy(update={"detector": profile.detector.model_copy(update={"pretrained": False})}),
                  data_root=str(data_root), cache=str(tmp_path / "stages"))
    costs = cost_table([setup.score("m3fd", row) for row in ("vi", "caf", "caf")])
    train = 5  # of 8 pairs
    assert costs.runs.to_dict() == {"FinetuneDetector": 2, "Search": 1, "TrainFusion": 1}
    assert costs.megapixels["FinetuneDetector"] == pytest.approx(2 * 100 * train * 640 ** 2 / 1e6)
    assert costs.megapixels["Search"] == pytest.approx(10 * train * 320 ** 2 / 1e6)
    assert costs.megapixels["TrainFusion"] == pytest.approx(100 * 1000 * 32 ** 2 / 1e6)
    assert costs.hours["Search"] == pytest.approx(costs.megapixels["Search"] * COSTS["Search"] / 3600)
    assert "hours on two CPU cores" in describe(small, [Need("x", "there", "y")], costs)


def test_the_cost_is_that_of_the_committed_cells():
    "A cost times the counted megapixels gives the seconds that profile mini took, within a factor of two."
    import json
    mini = Profile.named("mini")
    cell = json.loads((Path(__file__).resolve().parents[1] / "results/mini/cells/m3fd-caf-1.json").read_text())["provenance"]
    costs = cost_table([Setup(profile=mini, cache="/nowhere").score("m3fd", "caf")])
    hours = costs.hours / costs.runs
    for kind, name in (("Search", "search seconds"), ("TrainFusion", "fusion seconds")):
        assert 0.5 < 3600 * hours[kind] / float(cell[name]) < 2
