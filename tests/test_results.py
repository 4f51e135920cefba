"""Pictures made elsewhere in a table, and Figure 6 as its users run it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from caf_nb.config import DataSettings, Profile
from caf_nb.data import read_image, write_png
from caf_nb.report import compare, show_table
from caf_nb.stages.sources import Data
from caf_nb.report.study import (
    CLAIMS, CONTROLS, HEAD_ROOM, REMEDIES, agreement, compare_forms, compare_pictures, crossed_scores, decide_rows, finished, head_room, measure_effects, read_real,
    compare_options, try_options,
)
from caf_nb.rows import Setup, cell_file, cells, read_cell, scores, table1, table2, table3
from cells import run_cells

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_pictures_stand_in_for_a_row_of_a_table(tmp_path):
    "Infrared images under another name: the row has the scores that the infrared row has, since a detector sees no difference."
    smoke = Profile.named("smoke")
    short = smoke.model_copy(update={"data": DataSettings(source="embedded", size=64, train=4, val=4, test=4),
                                     "detector": smoke.detector.model_copy(update={"epochs": 1})})
    for dataset in ("m3fd", "multispectral"):
        data = Data(name=dataset, settings=short.data)
        for split in ("train", "val", "test"):
            (tmp_path / "mymethod" / dataset / split).mkdir(parents=True)
            for scene in data.split(split):
                write_png(tmp_path / "mymethod" / dataset / split / f"{scene.stem}.png", scene.ir.expand(3, -1, -1))
    stages = table1(Setup(profile=short, fused_root=str(tmp_path), cache=str(tmp_path / "cache")), ["ir", "mymethod"])
    found = scores(cells(stages, tmp_path / "cells", progress=False))
    for dataset in ("m3fd", "multispectral"):
        assert str(found[dataset, "mymethod"]) == str(found[dataset, "ir"])  # as text: nan is not equal to itself
    assert "pictures in" in stages["m3fd", "mymethod"].provenance()["fusion network"]
    assert "mymethod" in show_table(compare(1, found, short), "m3fd").to_html()


@pytest.mark.shared
@pytest.mark.slow
def test_figure6_on_real_pairs(shared, tmp_path):
    "All methods whose official weights are there, and pictures from elsewhere, on a pair of TNO."
    (tmp_path / "fused/mine/tno").mkdir(parents=True)
    write_png(tmp_path / "fused/mine/tno/05.png", read_image(next((shared / "data/tno/ir").glob("05.*"))))
    run_cells("figure6", out=str(tmp_path / "results"), data_root=str(shared / "data"), weights_root=str(shared / "weights"), fused_root=str(tmp_path / "fused"),
              pairs="tno/05", methods="ir,vi,didfuse,sdnet,umfusion,defusion,reconet,u2fusion,tardal,mine,caf")
    origin = pd.read_csv(tmp_path / "results/figure6.csv", index_col="method")["fusion network"]
    assert set(origin.index) == {"ir", "vi", "didfuse", "sdnet", "reconet", "u2fusion", "tardal", "mine", "caf"}
    assert "tardal.pt" in origin["tardal"] and "Det_final.pth" in origin["caf"]
    assert read_image(tmp_path / "results/figure6_tno_05.png").shape[0] == 3


def test_committed_cells_belong_to_the_settings_of_their_profile():
    "Taken out: what `DetectorSettings` keeps from before its recipes. Then no number of a detector was found, and the tables would have been computed again."
    mini, folder = Profile.named("mini"), ROOT / "results/mini/cells"
    setup, found = Setup(profile=mini, trained=mini.trained), {}
    for seed in mini.seeds:
        for claims in (CLAIMS, CONTROLS):
            found |= finished(setup.model_copy(update={"seed": seed}), [seed], folder, claims)
    for table, rows in ((table1, mini.methods), (table2, mini.methods), (table3, mini.ablation)):
        found |= {(*key, 0): cell for key, stage in table(setup, rows).items() if (cell := read_cell(stage, cell_file(folder, *key, 0)))}
    committed = {path.name for path in folder.glob("*.json") if path.name.count("-") == 2}
    assert {cell_file(folder, *key).name for key in found} == committed


def test_decisions_follow_from_their_cells():
    "Profile frozen: every cell belongs to its settings, and gates and verdicts are what the cells say."
    frozen, folder = Profile.named("frozen"), ROOT / "results/frozen"
    setup, asked = Setup(profile=frozen), [claim for claim in CLAIMS if claim.name in frozen.claims]
    seeds = sorted({int(path.stem.rpartition("-")[2]) for path in folder.glob("cells/m3fd-caf-*.json")})
    found, effects = finished(setup, seeds, folder / "cells", asked), measure_effects(setup, frozen.pilot, folder / "cells", run=False)
    tried, room = finished(setup, seeds, folder / "cells", REMEDIES), finished(setup, frozen.pilot, folder / "cells", HEAD_ROOM)
    crossed = crossed_scores(setup, frozen.seeds[:4], frozen.pilot[:2], frozen.pilot[:2], folder / "cells", run=False)
    names = {cell_file(folder, *key).name for key in found | tried | room}
    names |= {f"{kind}-{task}-{seed}.json" for kind in ("effects", "directions") for task, seed in effects}
    options = try_options(setup, frozen.pilot, folder / "cells", run=False)
    names |= {cell_file(folder, *key).name for key in options}
    names |= {f"crossed-{r.task}-{r.search}-{r.fusion}-{r.test}.json" for r in crossed.itertuples()}
    assert names == {path.name for path in folder.glob("cells/*.json")}
    for name, made in (("claims", decide_rows(found, asked, frozen.looks)), ("gates", agreement(effects).reset_index()),
                       ("controls", pd.concat([decide_rows(found | tried, [claim], frozen.looks) for claim in REMEDIES], ignore_index=True)),
                       ("options", compare_options(options, effects).reset_index())):
        pd.testing.assert_frame_equal(made, pd.read_csv(folder / f"{name}.csv"), check_dtype=False, atol=1e-9)
    assert head_room(room).seeds.min() >= 3


def test_tables_of_real_pairs_follow_from_their_cells():
    real = read_real(ROOT / "results/real")
    searched = pd.concat([compare_forms(real.arms, row=row) for row in ("caf_p", "caf_balanced")])
    for name, made in (("figure7", compare_pictures(real.measured)), ("table1", compare_forms(real.scores)), ("search", searched.reset_index(drop=True))):
        written = pd.read_csv(ROOT / f"results/real/{name}.csv")
        pd.testing.assert_frame_equal(made, written, check_dtype=False, atol=1e-9)


def test_readme_tells_the_verdicts_on_real_pairs():
    found = pd.read_csv(ROOT / "results/real/figure7.csv")
    found = found[(found.claim == "caf_nb") & ~found.against.isin(["ir", "vi", "mean"])]
    n = found.verdict.value_counts()
    said = f"of {len(found)} comparisons (five methods, four metrics, all pairs of TNO and RoadScene given here) CAF is better in {n.better}, worse in {n.worse} and equivalent in {n.equivalent}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert said in readme
    every = pd.read_csv(ROOT / "results/real/table1.csv").set_index(["metric", "against"])
    judged, own = every[every.claim.isin(["yolov5n", "espnetv2"])], every[every.claim == "yolov5n, own"].loc["mAP@.5"]
    assert [*own.index[own.verdict != "better"]] == ["mean", "sdnet"] and {*own.loc[["mean", "sdnet"]].verdict} == {"undecided"}
    assert len(own) == 8 and all(f"+{c.effect:.1f} [{c.low:+.1f}, {c.high:+.1f}]" in readme for c in own.loc[["tardal", "sdnet", "mean"]].itertuples())
    for key in (*(("mAP@.5", against) for against in ("tardal", "sdnet", "mean")), ("person filled", "sdnet"), ("car filled", "didfuse")):
        c = judged.loc[key]
        assert f"{c.effect:+.1f} [{c.low:+.1f}, {c.high:+.1f}]" in readme
    searched = pd.read_csv(ROOT / "results/real/search.csv").set_index(["row", "metric", "against"])
    c = searched.loc["caf_p", "mAP@.5:.95", "caf_a"]
    assert f"({c.effect:+.1f} [{c.low:+.1f}, {c.high:+.1f}] of mAP@.5:.95)" in readme and c.verdict == "undecided"
    assert {*judged.loc["person filled"].verdict} == {"better"} and [*judged.loc["car filled"].query("verdict == 'worse'").index] == ["vi", "didfuse", "reconet"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_executed_notebooks_can_be_shown(path):
    "Small enough for GitHub, run to the end, and without what went to stderr."
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert path.stat().st_size < 400_000 and all(cell["execution_count"] for cell in cells) and outputs
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
