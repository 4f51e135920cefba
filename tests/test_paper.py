"""The printed values against the transcription beside the checkout, and against each other."""

import csv
import re
from collections import Counter

import pytest

from caf_nb import config
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES, MULTISPECTRAL_CLASSES
from caf_nb.fusion import load_fusion
from caf_nb.losses import Variant
from caf_nb.paper import differences, evidence, notes, paper_table, prescriptions, statements, support

ROWS = {"Infrared": "ir", "Visible": "vi", "Ours": "caf", "Ours _H": "caf_h", "Ours _R": "caf_r", "Ours _A": "caf_a"}
MFNET = {"Unlabel": "unlabelled", "Cone": "color_cone"}


def column(n: int, name: str) -> tuple[str, str]:
    "Our (data set, metric) for a column of the transcription."
    group, _, metric = name.partition(".")
    if n == 1: return group, {"Motor": "Motorcycle"}.get(metric, metric)
    if n == 2: return "mfnet", f"{metric} {MFNET.get(group, group.lower())}" if metric else group
    if not metric: return "fused", group
    if group == "detection": return "m3fd", metric
    return "mfnet", metric if metric == "mIoU" else f"IoU {metric.lower()}"


@pytest.mark.shared
@pytest.mark.parametrize("n, count", [(1, 150), (2, 180), (3, 70)])
def test_every_value_is_as_transcribed(shared, n, count):
    with (shared / f"paper/table{n}.csv").open(encoding="utf-8") as file: rows = list(csv.DictReader(file))
    table, label = paper_table(n), list(rows[0])[0]
    found = {(ROWS.get(r[label], r[label].lower().replace(" ", "")), column(n, name)): float(value)
             for r in rows for name, value in r.items() if name not in (label, "source")}
    assert len(found) == count == table.count().sum()
    assert found == {(row, key): table.at[row, key] for row, key in found}
    assert list(table.index) == list(dict.fromkeys(row for row, _ in found))


def test_columns_are_those_of_the_data():
    "The classes in the order of the data sets; the ninth of MFNet is there, without a value."
    tables = {n: paper_table(n) for n in (1, 2, 3)}
    assert [int(t.count().sum()) for t in tables.values()] == [150, 180, 70]
    assert tuple(tables[1]["m3fd"])[:-2] == M3FD_CLASSES
    assert tuple(tables[1]["multispectral"])[:-2] == MULTISPECTRAL_CLASSES
    assert list(tables[2]["mfnet"])[:-2] == [f"{kind} {name}" for name in MFNET_CLASSES for kind in ("Acc", "IoU")]
    empty = [key for key in tables[2] if tables[2][key].isna().all()]
    assert empty == [("mfnet", "Acc car_stop"), ("mfnet", "IoU car_stop")] and tables[2].isna().sum().sum() == 20
    assert not tables[1].isna().any(axis=None) and not tables[3].isna().any(axis=None)


def test_the_printed_means():
    "Class means are the printed mAP, but for one row; the nine-class means imply a car_stop that can be."
    detection, segmentation = paper_table(1), paper_table(2)["mfnet"]
    for dataset in ("m3fd", "multispectral"):
        mean = detection[dataset].drop(columns=["mAP@.5:.95", "mAP@.5"]).mean(axis=1)
        wrong = [row for row in mean.index if abs(mean[row] - detection.at[row, (dataset, "mAP@.5:.95")]) > 0.051]
        assert wrong == (["umfusion"] if dataset == "multispectral" else [])
    implied = {kind: 9 * segmentation[f"m{kind}"] - segmentation.filter(like=f"{kind} ").sum(axis=1)
               for kind in ("Acc", "IoU")}
    assert (implied["IoU"] < implied["Acc"]).all() and implied["IoU"].min() > 0 and implied["Acc"].max() < 100
    said = {note.metric: note.text for note in notes(2) if not note.row}
    for kind, values in implied.items():
        found = f"imply {values.min():.1f} to {values.max():.1f}, and {values['caf']:.1f} for CAF"
        assert found in said[f"{kind} car_stop"]


def test_every_note_has_its_cell():
    for n in (1, 2, 3):
        table = paper_table(n)
        for note in notes(n):
            assert not note.row or note.row in table.index, note
            assert not note.metric or (note.dataset, note.metric) in table, note
    assert len(notes(0)) and all(note.row and not note.metric for note in notes(0))


def test_what_the_printed_values_say_of_the_text():
    verdicts = {s.name: support(s) for s in statements()}
    assert verdicts["headline, detection"].verdict == verdicts["headline, segmentation"].verdict == "supported"
    assert Counter(v.verdict for v in verdicts.values()) == {"supported": 8, "no values": 6, "in part": 1}
    quality = evidence(next(s for s in statements() if s.name == "search, fusion quality"))
    assert set(quality[~quality.holds].row) == {"umfusion_p", "reconet_p"}
    assert quality.set_index(["row", "metric"]).loc[("umfusion_p", "MI"), "lead"] == -0.021


def test_a_difference_for_every_field_of_the_loss():
    assert {d.field for d in differences()} - {""} == set(Variant.model_fields)
    assert len({(d.part, d.paper, d.released, d.changes) for d in differences()}) == len(differences())


@pytest.mark.shared
def test_the_published_weights_counted_400(shared):
    state = load_fusion("caf", shared / "weights/caf/Det_final.pth", "cpu").state_dict()
    counted = [int(value) for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counted and set(counted) == {400}
    assert any("400" in d.released and d.basis == "tested" for d in differences())


def test_options_of_prescriptions_are_settings():
    "Every `Class.field` that an option names is a field of that settings model."
    models = {"Variant": Variant} | {name: value for name, value in vars(config).items() if isinstance(value, type)}
    named = [match for p in prescriptions() for match in re.findall(r"\b([A-Z]\w+)\.(\w+)", p.option)]
    assert len(named) > 25 and [f"{model}.{field}" for model, field in named if field not in models[model].model_fields] == []
