"""Damage, full disks, killed and concurrent processes: nothing is lost, nothing wrong is read, and one sentence says what happened."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import nn
from typer.testing import CliRunner

import caf_nb.fusion
from caf_nb import stages
from caf_nb.checkpoints import verified
from caf_nb.cli import eval_app, fuse_app
from caf_nb.config import DataSettings, FusionSettings, SearchSettings, SegmenterSettings
from caf_nb.core import CafError, part_of, printable, replacing
from caf_nb.data import write_png
from caf_nb.fusion import FusionNet, load_fusion, save_fusion
from caf_nb.loop import read_state, write_state, writing_folder
from caf_nb.losses import TERMS, LossSpace
from caf_nb.losses.vgg import load_vgg
from caf_nb.rows import Cell, read_cell
from caf_nb.search import search
from caf_nb.stages import CheckedInfra, FuseDataset, MeasureFusion, Method, Weighted, bundled_weights
from caf_nb.stages.sources import Data
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter

pytestmark = [pytest.mark.disable_socket, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]


def same(a, b) -> bool:
    "Equal to the bit, tensors included."
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def flips(content: bytes, n: int, seed: int):
    "Copies of `content` with one random bit flipped."
    draw = random.Random(seed)
    for _ in range(n):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


@contextmanager
def small_files(size: int):
    "No file may grow beyond `size` bytes inside the block: a full disk, as far as a writer can tell."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_sentence(error: BaseException) -> bool:
    return isinstance(error, CafError) and len(str(error)) < 400 and str(error).isprintable()


# Damage: states


class Pixel(nn.Module):
    "The least task."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def loss(self, images, targets): return self.conv(images).square().mean()
    def targets(self, batch): return None


class Mixed(nn.Module):
    "The least fusion network."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 1)

    def forward(self, ir, vi): return self.conv(torch.cat([ir, vi], 1)).sigmoid()


def search_state(folder: Path) -> Path:
    torch.manual_seed(0)
    scenes = SynthScenes(3, 32, seed=5)[:]
    search(Mixed(), Pixel(), LossSpace("paper", load_vgg("slim")), scenes[:2], scenes[2:], SearchSettings(epochs=1, batch_size=2), progress=False, folder=folder)
    return folder / "search.pt"


def training_state(folder: Path) -> Path:
    net = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    write_state(folder / "a.pt", {"a": "b"}, net=net.state_dict(), optimizer=optimizer.state_dict(), rows=[{"a": 0.5, "b": math.nan}], random=torch.get_rng_state())
    return folder / "a.pt"


@pytest.mark.parametrize("state", [search_state, training_state])
def test_a_flipped_bit_in_a_state_is_refused_or_harmless(tmp_path, state):
    """120 random bits, and the one that no checksum of a zip covers: the attribute that makes a member a folder, for which PyTorch reads nothing.
    Taken out: the look at `external_attr` in `_read_whole`. Then a tensor came back with other values, and the last line failed; of 48,424 flips of the second state it was 8,
    one a tensor. Taken out: `testzip`. Then 82 and 76 of the 120 random flips were read as other values."""
    file = state(tmp_path)
    whole, about = file.read_bytes(), torch.load(file, weights_only=True)["about"]
    kept, seen = read_state(file, about), {True: 0, False: 0}
    for damaged in flips(whole, 120, seed=3):
        file.write_bytes(damaged)
        try: found = read_state(file, about)
        except CafError as error: seen[one_sentence(error)] += 1
        else: seen[same(found, kept)] += 1
    assert seen == {True: 120, False: 0}, seen
    places = [i for i in range(len(whole)) if whole[i:i + 4] == b"PK\x01\x02"]  # the directory's entries; the attributes are at 38
    assert len(places) > 5
    for place in places:
        damaged = bytearray(whole)
        damaged[place + 38] ^= 0x10
        file.write_bytes(damaged)
        try: found = read_state(file, about)
        except CafError: continue
        assert same(found, kept), "a member that became a folder"


def test_a_state_that_fits_only_by_its_account_is_one_sentence(tmp_path):
    "Parts missing or of another shape, under the right account. Taken out: the last `except` in `_resume`. Then a KeyError came through."
    file = search_state(tmp_path)
    state = torch.load(file, weights_only=True)
    for wrong in ({"net": {}}, {"alpha": torch.zeros(3)}, {"losses": [1.0]}, {"random": []}, {"part0": state["part3"]}):
        torch.save(state | wrong, file)
        with pytest.raises(CafError, match="search.pt: does not fit this training") as caught: search_state(tmp_path)
        assert one_sentence(caught.value)


def test_the_message_about_a_program_does_not_tell_how_to_run_it(tmp_path):
    "Taken out: the `except` in `load_plain`. Then the message was PyTorch's, which tells how to load the file all the same."
    torch.save({"about": {"a": "b"}, "x": Pixel()}, tmp_path / "a.pt")
    with pytest.raises(CafError, match=r"a\.pt: is no state of a training \(holds more than plain data\)") as caught: read_state(tmp_path / "a.pt", {"a": "b"})
    assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)


# Damage: results of stages


class Made(NamedTuple):
    value: float
    file: Path


class Stage(BaseModel):
    "A number that no other call draws, and a file."
    name: str = "a"
    infra: CheckedInfra = CheckedInfra(version="1", mode="retry")

    @infra.apply
    def run(self) -> Made:
        folder = Path(self.infra.uid_folder()).resolve()
        with (folder / "calls").open("a") as calls: calls.write("x")
        time.sleep(0.2 * (self.name == "slow"))
        value = random.SystemRandom().random()
        (folder / "checkpoint").write_text(str(value))
        return Made(value, folder / "checkpoint")


def stage(folder: Path, **given) -> Stage: return Stage(infra={"folder": folder}, **given)
def calls(folder: Path) -> int: return len(next(folder.rglob("calls")).read_text())


def read_again(folder: Path):
    "The result as another process would read it, and the warnings."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = stage(folder).run()
    return found, [str(w.message) for w in told]


def test_a_flipped_bit_in_a_result_is_computed_again(tmp_path):
    """Of 120 flips in the files of a result each is harmless, or the stage is computed again with one warning.
    Taken out: the comparison in `_damage`. Then a result and the file that it names were of two numbers, without a word."""
    kept, again = stage(tmp_path).run(), 0
    folder = next(tmp_path.rglob("job.pkl")).parent
    names = sorted({"job.pkl", "checkpoint", "sums.json", *(p.name for p in folder.glob("*.yaml"))})
    assert len(names) == 6 and read_again(tmp_path) == (kept, [])
    for i, name in enumerate(names * 20):
        whole, before = (folder / name).read_bytes(), calls(tmp_path)
        (folder / name).write_bytes(next(flips(whole, 1, seed=i)))
        found, told = read_again(tmp_path)
        assert found.file.read_text() == str(found.value)
        if calls(tmp_path) == before: assert (found, told) == (kept, []), name
        else:
            assert len(told) == 1 and len(told[0]) < 400 and "is damaged and is computed again" in told[0]
            kept, again = found, again + 1
    assert again > 90


@pytest.mark.parametrize("name, content", [("job.pkl", None), ("job.pkl", b""), ("job.pkl", b"\x80\x05\x95"), ("uid.yaml", b"name: b\n"), ("job.pkl", b"cnowhere\nNothing\n.")])
def test_an_older_result_that_cannot_be_read_is_computed_again(tmp_path, name, content):
    """Results from before there were checksums are read; where that fails they are made again.
    Taken out: the `except` of `_damage`. Then an EOFError, an UnpicklingError and exca's RuntimeError came through."""
    kept = stage(tmp_path).run()
    folder = next(tmp_path.rglob("job.pkl")).parent
    (folder / "sums.json").unlink()
    assert stage(tmp_path).infra.status() == "completed" and read_again(tmp_path) == (kept, []) and (folder / "sums.json").exists()
    (folder / "sums.json").unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:100] if content is None else content)
    assert stage(tmp_path).infra.status() == ("not submitted" if name == "job.pkl" else "completed")
    found, told = read_again(tmp_path)
    assert found != kept and len(told) == 1 and "is computed again" in told[0] and printable(told[0]) == told[0]


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    "Taken out: the `except OSError` in `CheckedInfra.job`. Then exca's OSError came through."
    with small_files(100), pytest.raises(CafError, match=r"cannot be written \(File too large\)") as caught: stage(tmp_path).run()
    assert one_sentence(caught.value) and not list(tmp_path.rglob("*.part"))
    (tmp_path / "file").touch()
    with pytest.raises(CafError, match=r"cannot be written \(Not a directory\)"): stage(tmp_path / "file/cache").run()


def test_bundled_weights_are_compared_with_their_checksums(tmp_path, monkeypatch):
    "Taken out: `verified` in `bundled`. Then the network had another weight, without a word."
    shutil.copytree(Path(caf_nb.fusion.__file__).parent / "weights", tmp_path / "weights")
    monkeypatch.setattr(caf_nb.fusion.resources, "files", lambda package: tmp_path)
    load_fusion("caf")
    for name, file in (("caf.safetensors", "caf.safetensors"), ("yolov5n.safetensors", "yolov5n.safetensors"), ("segformer-tiny", "segformer-tiny/model.safetensors")):
        assert bundled_weights(name)
        content = bytearray((tmp_path / "weights" / file).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "weights" / file).write_bytes(content)
        verified.cache_clear()
        with pytest.raises(CafError, match=f"{name}: is not the file that came with the package"): bundled_weights(name)
    with pytest.raises(CafError, match="is not the file that came with the package"): load_fusion("caf")


# Two processes


def in_processes(*functions):
    "Each in a fork of its own; their results."
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    def tell(i, function):
        try: queue.put((i, function()))
        except BaseException as error: queue.put((i, repr(error)))
    processes = [context.Process(target=tell, args=pair) for pair in enumerate(functions)]
    for process in processes: process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes: process.join()
    return [found[i] for i in range(len(functions))]


def test_two_processes_ask_for_one_stage(tmp_path):
    """It is computed once, and all have the same number.
    Taken out: the lock in `CheckedInfra.job`. Then more than one of them computed."""
    found = in_processes(*[lambda: stage(tmp_path, name="slow").run().value] * 3)
    assert calls(tmp_path) == 1 and len(set(found)) == 1


def test_two_processes_ask_for_stages_that_share_one(tmp_path):
    "Metrics of the same fused pictures, by real stages: fused once, and the numbers are those of one process."
    data = Data(name="m3fd", settings=DataSettings(source="embedded", size=32, train=1, val=1, test=1))
    def measured(folder, metric):
        fused = FuseDataset(data=data, model=Method(method="mean"), infra={"folder": folder})
        return MeasureFusion(fused=fused, metrics=(metric,), infra={"folder": folder}).run()
    alone = [measured(tmp_path / "alone", metric) for metric in ("SD", "EN")]
    assert in_processes(lambda: measured(tmp_path / "both", "SD"), lambda: measured(tmp_path / "both", "EN")) == alone
    assert len(list((tmp_path / "both").rglob("job.pkl"))) == 3


def test_a_killed_process_lets_go_of_its_stage(tmp_path):
    "SIGKILL while it computes: another process computes at once."
    context = multiprocessing.get_context("fork")
    process = context.Process(target=stage(tmp_path, name="slow").run)
    process.start()
    for _ in range(1000):
        if list(tmp_path.rglob("calls")): break
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not list(tmp_path.rglob("job.pkl"))
    stage(tmp_path, name="slow").run()
    assert calls(tmp_path) == 2


def test_parts_of_living_processes_stay(tmp_path):
    """Only a process that has ended loses its `.part`, and only on this machine.
    Taken out: `_is_dead`, with True in its place. Then the parts of the living process and of the other machine were deleted."""
    file, living, ended = tmp_path / "a.pt", subprocess.Popen(["sleep", "60"]), subprocess.Popen(["true"])
    ended.wait()
    def part(pid, host=""):
        name = part_of(file).name.replace(str(os.getpid()), str(pid))
        return file.with_name(name.replace("@", f"@{host}", 1))
    try:
        for path in (part(living.pid), part(ended.pid), part(ended.pid, "another-")): path.touch()
        write_state(file, {"a": "b"})
        assert {p.name for p in tmp_path.iterdir()} == {"a.pt", part(living.pid).name, part(ended.pid, "another-").name}
    finally:
        living.kill()
        living.wait()


def test_two_processes_write_one_state_and_one_folder(tmp_path):
    "Again and again at once: each write succeeds, whole files are left, and no parts. Taken out: the process in the name of a part, so that both have one. Then a write failed."
    def write(number):
        def both():
            for _ in range(40):
                write_state(tmp_path / "a.pt", {"a": "b"}, x=torch.full((1000,), number))
                with writing_folder(tmp_path / "net") as aside: (aside / "a.txt").write_text(str(number) * 1000)
                assert read_state(tmp_path / "a.pt", {"a": "b"})["x"].unique().numel() == 1
            return "done"
        return both
    assert in_processes(write(1), write(2)) == ["done", "done"]
    assert (tmp_path / "net/a.txt").read_text() in ("1" * 1000, "2" * 1000)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.pt", "a.txt", "net"]


# One sentence for every bad file


@pytest.mark.parametrize("given", [("c" * 90_000_000,), ("c", "f" * 10**6, "r" * 10**6), ("a\x1b[2Jb\nc\u202ed\udcff\0",), ("c", "\x1b]0;owned\x07\n.png", "\r")])
def test_any_message_is_short_and_printable(given):
    "Taken out: `printable`, with `str` in its place. Then a message had 90 MB, and others held sequences for a terminal."
    error = CafError(*given)
    assert one_sentence(error) and given[0][0] in str(error)
    assert len(error.cause) < 400


@pytest.fixture
def pairs(tmp_path):
    "Two pairs of pictures, and a file without partner whose name is none for a terminal."
    for kind, channels in (("ir", 1), ("vi", 3)):
        (tmp_path / kind).mkdir()
        for name in "ab": write_png(tmp_path / kind / f"{name}.png", torch.rand(channels, 32, 32))
    return tmp_path


def test_names_that_talk_to_the_terminal(pairs):
    "Taken out: `printable` in `_say`. Then the sequence that clears the screen was written to it."
    shutil.copy(pairs / "ir/a.png", pairs / "ir/x\x1b[2J\ncaf-fuse: all well.png")
    (pairs / "vi/b.png").rename(pairs / "vi/b\x1b[31m.png")
    (pairs / "ir/b.png").rename(pairs / "ir/b\x1b[31m.png")
    (pairs / "vi/b\x1b[31m.png").write_bytes(b"no picture")
    run = CliRunner().invoke(fuse_app, ["--ir", str(pairs / "ir"), "--vi", str(pairs / "vi"), "--out", str(pairs / "out"), "--method", "mean"])
    assert run.exit_code == 1 and "\x1b[2J" not in run.stderr and "\x1b[31m" not in run.stderr
    lines = [line.rpartition("\r")[2] for line in run.stderr.split("\n") if "caf-fuse: " in line]
    assert len(lines) == 2 and r"x\x1b[2J\ncaf-fuse: all well.png: has no partner" in lines[0] and r"b\x1b[31m.png: is not an image" in lines[1]


def test_a_full_disk_while_a_state_is_written(tmp_path):
    "Taken out: the buffer in `write_state`, with `torch.save` to the file. Then a RuntimeError spoke of an unexpected pos."
    write_state(tmp_path / "a.pt", {"a": "b"}, x=torch.ones(1))
    with small_files(2000), pytest.raises(CafError, match=r"a\.pt: cannot be written \(File too large\)") as caught:
        write_state(tmp_path / "a.pt", {"a": "b"}, x=torch.zeros(10_000))
    assert one_sentence(caught.value) and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert read_state(tmp_path / "a.pt", {"a": "b"})["x"].item() == 1
    with small_files(2000), pytest.raises(CafError, match="cannot be written"), replacing(tmp_path / "b") as part: part.write_bytes(bytes(3000))


def test_a_full_disk_while_metrics_are_written(pairs, monkeypatch):
    """The table is printed, and every value with it, as there is nowhere else to put it.
    Taken out: the `except` in `_measure`. Then there was a sentence, and all the values were lost."""
    out = pairs / "scores.csv"
    options = ["--ir", str(pairs / "ir"), "--vi", str(pairs / "vi"), "--fused", str(pairs / "vi"), "--out", str(out), "--metrics", "SD,EN"]
    with small_files(30): run = CliRunner().invoke(eval_app, options)
    assert run.exit_code == 1 and isinstance(run.exception, SystemExit) and not out.exists()
    assert run.stderr.rstrip().rpartition("\n")[2].startswith(f"caf-eval: {out}: cannot be written (File too large)")
    values = [line.split(",") for line in run.stdout.splitlines() if line.count(",") == 3]
    assert values[0] == ["image", "method", "metric", "value"] and len(values) == 5 and all(float(row[3]) > 0 for row in values[1:])
    assert CliRunner().invoke(eval_app, options).exit_code == 0
    written = pd.read_csv(out)
    assert written.value.tolist() == [float(row[3]) for row in values[1:]]


@pytest.mark.parametrize("text", ['{"stage": "a", "values": {"mAP": 1e999}}', '{"stage": "a", "values": {"mAP": NaN}}', '{"stage": "a", "values": {"mAP": %s}}' % ("9" * 5000), "[" * 100_000, "{", "\xff", "",
                                  '{"stage": "a\\u001b[2J", "values": {"\\n": "x"}}'])
def test_broken_cells(tmp_path, text):
    "Taken out: `allow_inf_nan=False` of `Cell`. Then 1e999 was a score of infinity."
    whole = text.replace("}}", '}, "provenance": {}, "configuration": {}, "environment": {}}')
    (tmp_path / "a.json").write_text(whole, encoding="latin1")
    with pytest.raises(CafError, match=r"a\.json: is no cell") as caught: read_cell(stage(tmp_path), tmp_path / "a.json")
    assert one_sentence(caught.value)
    assert Cell(stage="a", values={"mAP": 1.0, "AP": None}, provenance={}, configuration={}, environment={}).scores["mAP"] == 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_settings_that_are_no_numbers(wrong):
    "Taken out: `allow_inf_nan=False` and the bounds. Then a network was trained with weights of nan, and with a learning rate of infinity."
    for make in (lambda: Weighted(beta=(wrong, *[0.1] * (len(TERMS) - 1))), lambda: FusionSettings(epochs=1, batch_size=1, lr=wrong),
                 lambda: SegmenterSettings(model="tiny", steps=1, batch_size=1, lr=wrong, pretrained=False),
                 *(lambda name=name: SearchSettings(epochs=1, batch_size=1, **{name: wrong}) for name in ("lr_alpha", "lr_fusion", "lr_task", "max_norm", "tolerance"))):
        with pytest.raises(ValidationError): make()


def test_weights_that_are_not_finite(tmp_path):
    "Taken out: `finite` where a network takes its weights. Then networks of nan were loaded."
    broken = FusionNet()
    nn.init.constant_(broken.out.bias, math.nan)
    save_fusion(tmp_path / "caf.safetensors", broken, {})
    vgg = {f"features.{name}": t for name, t in load_vgg("random").layers.state_dict().items()}
    torch.save(vgg | {"features.0.bias": torch.full((64,), math.inf)}, tmp_path / "vgg.pth")
    detector, segmenter = Detector(("car",)), Segmenter(("car",))
    nn.init.constant_(next(detector.net.parameters()), math.nan)
    nn.init.constant_(next(segmenter.net.parameters()), math.nan)
    torch.save({"model": detector.net}, tmp_path / "detector.pt")
    segmenter.save(tmp_path / "segmenter")
    for load, name in ((lambda file: load_fusion("caf", file), "caf.safetensors"), (load_vgg, "vgg.pth"), (lambda file: Detector(("car",), weights=file), "detector.pt"),
                       (lambda file: Segmenter(("car",), weights=file), "segmenter")):
        with pytest.raises(CafError, match=f"{name}: .*weights that are not finite, such as") as caught: load(tmp_path / name)
        assert one_sentence(caught.value)
