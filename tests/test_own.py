"""caf-search from the outside: labelled pairs in, a loss, a network, scores and a page out."""

import json

import pytest
import torch
from typer.testing import CliRunner

from caf_nb.cli import search_app
from caf_nb.config import FusionSettings, Profile, SearchSettings
from caf_nb.data import write_png
from caf_nb.search import SearchResult
from caf_nb.stages.own_data import own_pairs, read_layout
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "Parts train and val only, as many have them for ultralytics; one root for each camera, and masks."
    root = tmp_path_factory.mktemp("pairs")
    scenes = SynthScenes(14, (64, 64), seed=1, task="segmentation")
    for i, scene in enumerate(scenes):
        part = "train" if i < 10 else "val"
        for kind in ("ir", "vi", "masks"):
            (root / kind / part).mkdir(parents=True, exist_ok=True)
            write_png(root / kind / part / f"{scene.stem}.png", scene.mask[None].byte() if kind == "masks" else getattr(scene, kind))
    (root / "data.yaml").write_text(f"ir: ir\nvi: vi\nmasks: masks\nmodel: tiny\nnames: {dict(enumerate(scenes.classes))}\n")
    return root


def search(root, *words):
    return CliRunner().invoke(search_app, [str(root / "data.yaml"), "--profile", "smoke", "--size", "64", *map(str, words)], catch_exceptions=False)


def test_val_is_held_out_for_the_scores(pairs):
    found = own_pairs(read_layout(pairs / "data.yaml"))
    assert {part for item in found.listed for part in item.parts} == {"train", "test"}
    assert sum("test" in item.parts for item in found.listed) == 4


def test_from_pairs_to_a_page(pairs, tmp_path, monkeypatch):
    "Every file is there, and they say the same."
    smoke = Profile.named("smoke")
    shorter = {"search": SearchSettings(epochs=1, batch_size=5), "fusion": FusionSettings(epochs=1, batch_size=4, crop=32),
               "segmenter": smoke.segmenter.model_copy(update={"steps": 2})}
    monkeypatch.setattr(Profile, "named", lambda name: smoke.model_copy(update=shorter))
    run = search(pairs, "--out", tmp_path, "--compare", "mean", "--json")
    found = json.loads(run.stdout)
    assert run.exit_code == 0 and list(found["scores"]) == ["mean", "searched"]
    assert {p.name for p in tmp_path.iterdir()} >= {"loss.json", "fusion.safetensors", "fusion.json", "scores.csv", "index.html"}
    beta = SearchResult.load(tmp_path / "loss.json").beta
    assert list(found["weights"].values()) == pytest.approx(beta.tolist(), abs=1e-6) and beta.std() > 1e-4
    assert float((tmp_path / "scores.csv").read_text().splitlines()[1].split(",")[-1]) == pytest.approx(found["scores"]["mean"]["mIoU"], abs=1e-6)


@pytest.mark.long
def test_any_detector_of_ultralytics_and_a_start(tmp_path, monkeypatch):
    "Boxes, yolo11n, and weights that somebody trained with ultralytics."
    for kind in ("ir", "vi", "labels"): (tmp_path / kind).mkdir()
    for scene in (scenes := SynthScenes(14, 64, seed=1)):
        for kind in ("ir", "vi"): write_png(tmp_path / kind / f"{scene.stem}.png", getattr(scene, kind))
        rows = (f"{int(c)} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in scene.boxes.tolist())
        (tmp_path / f"labels/{scene.stem}.txt").write_text("".join(rows))
    torch.save({"model": Detector(("person", "car"), "yolo11n", seed=3).net}, tmp_path / "trained.pt")
    (tmp_path / "data.yaml").write_text(f"ir: ir\nvi: vi\nlabels: labels\nmodel: yolo11n\nstart: trained.pt\nnames: {list(scenes.classes)}\n")
    smoke = Profile.named("smoke")
    shorter = {"search": SearchSettings(epochs=1, batch_size=5), "fusion": FusionSettings(epochs=1, batch_size=4, crop=32),
               "detector": smoke.detector.model_copy(update={"epochs": 1})}
    monkeypatch.setattr(Profile, "named", lambda name: smoke.model_copy(update=shorter))
    run = search(tmp_path, "--out", tmp_path / "out", "--compare", "mean", "--task", "detection")
    assert run.exit_code == 0 and "random weights" not in run.stdout
    assert "trained.pt" in (tmp_path / "out/index.html").read_text() and "yolo11n" in run.stdout


def test_the_check_comes_first(pairs, tmp_path):
    mask = next((pairs / "masks/train").iterdir())
    mask.rename(pairs / "masks/train/x.png")
    run = search(pairs, "--out", tmp_path / "out")
    (pairs / "masks/train/x.png").rename(mask)
    assert run.exit_code == 1 and "no label" in run.stdout and "go on without the pairs concerned: --anyway" in run.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, sentence", [(("--task", "detection"), "the labels are for segmentation"), (("--compare", "equals"), "there is no row 'equals'"),
                                             (("--profile", "huge"), "there is no profile 'huge'"), (("--size", "33"), "33 is no multiple of 32")])
def test_wrong_words(pairs, tmp_path, words, sentence):
    run = search(pairs, "--out", tmp_path / "out", *words)
    assert run.exit_code == 2 and sentence in run.stderr and not (tmp_path / "out").exists()
