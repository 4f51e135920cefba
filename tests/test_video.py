"""Two videos, or two folders of frames, become one video."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

av = pytest.importorskip("av", reason="the extra video is not installed")

from caf_nb.cli import fuse_app  # noqa: E402
from caf_nb.data import Video, read_image, write_png  # noqa: E402
from caf_nb.data.pictures import write_video  # noqa: E402
from caf_nb.synth import SynthScenes  # noqa: E402

SCENES = [(scene.ir, scene.vi) for scene in SynthScenes(4, 64, seed=3)]


def write_deep(path, frames):
    "A thermal video of 16 bits, without loss."
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=5)
        for n, frame in enumerate(frames):
            if not n: stream.height, stream.width, stream.pix_fmt = *frame.shape, "gray16le"
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, "gray16le")): file.mux(packet)
        for packet in stream.encode(): file.mux(packet)


@pytest.fixture
def videos(tmp_path):
    "ir.mkv with 16 bits and counts of a camera, vi.mkv, and the frames of both in folders."
    counts = [(28_000 + 4_000 * ir[0].numpy()).round().astype(np.uint16) for ir, _ in SCENES]
    write_deep(tmp_path / "ir.mkv", counts)
    write_video(tmp_path / "vi.mkv", [(vi * 255).round().to(torch.uint8) for _, vi in SCENES], Fraction(5))
    for kind in ("ir", "vi"): (tmp_path / kind).mkdir()
    for i, (count, (_, vi)) in enumerate(zip(counts, SCENES)):
        Image.fromarray(count).save(tmp_path / f"ir/{i}.png")
        write_png(tmp_path / f"vi/{i}.png", vi)
    return tmp_path


def caf_fuse(folder, *more, ir="ir.mkv", vi="vi.mkv", out="fused.mkv", method="mean"):
    run = CliRunner().invoke(fuse_app, ["--ir", str(folder / ir), "--vi", str(folder / vi), "--out", str(folder / out), "--method", method, *more])
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    return run


def frames(path): return torch.stack([frame.expand(3, -1, -1) for frame in Video(path).frames()])


def test_videos_and_folders_of_frames_give_the_same(videos):
    "One range for all frames, and it is said; the mean of both sources says that it was used."
    run = caf_fuse(videos, "--ir-range", "28000,32000")
    assert run.exit_code == 0 and run.stdout.startswith("4 of 4 frames fused in ") and "infrared: 28000 became black, 32000 white" in run.stdout
    assert caf_fuse(videos, "--ir-range", "28000,32000", "--rate", "5", ir="ir", vi="vi", out="second.mkv").exit_code == 0
    fused = frames(videos / "fused.mkv")
    assert torch.equal(fused, frames(videos / "second.mkv")) and Video(videos / "second.mkv").rate == 5
    assert CliRunner().invoke(fuse_app, ["--ir", str(videos / "ir"), "--vi", str(videos / "vi"), "--out", str(videos / "out"), "--method", "mean", "--ir-range", "28000,32000"]).exit_code == 0
    assert all(torch.equal(fused[i], read_image(videos / f"out/{i}.png").expand(3, -1, -1)) for i in range(4))


def test_sixteen_bits(videos):
    "Without a range 65,535 is white; percentile takes one range from the whole video."
    said = caf_fuse(videos, "--gray", method="ir").stdout
    assert "infrared: 0 became black, all bits white" in said
    dark = frames(videos / "fused.mkv").mean(1)
    caf_fuse(videos, "--ir-range", "percentile", "--overwrite", "--gray", method="ir", out="fused.mkv")
    bright = frames(videos / "fused.mkv").mean(1)
    assert dark.max() < 0.55 and dark.max() - dark.min() < 0.1 and bright.max() - bright.min() > 0.9
    wanted = torch.stack([ir[0] for ir, _ in SCENES])
    assert np.corrcoef(bright.flatten(), wanted.flatten())[0, 1] > 0.98


def test_the_network(videos):
    "H.264 of CAF: near the same frames without loss; an existing result stays."
    for name in ("fused.mkv", "fused.mp4"): assert caf_fuse(videos, "--ir-range", "percentile", method="caf", out=name).exit_code == 0
    assert (frames(videos / "fused.mkv") - frames(videos / "fused.mp4")).abs().mean() < 0.02
    before = (videos / "fused.mp4").read_bytes()
    run = caf_fuse(videos, method="caf", out="fused.mp4")
    assert run.exit_code == 0 and "1 skipped" in run.stdout and (videos / "fused.mp4").read_bytes() == before
    found = json.loads(caf_fuse(videos, "--json", "--overwrite", method="mean", out="fused.mp4").stdout)["mean"]
    assert (found["frames"], found["levels"]) == (4, None)


@pytest.mark.parametrize("changes, more, sentence", [
    ({"out": "folder"}, [], "ir.mkv: is a video, and the result is none. Name a video"),
    ({"out": "vi.mkv"}, [], "vi.mkv: the result would overwrite a source"),
    ({"out": "no/fused.mkv"}, [], "no: there is no such folder"),
    ({"vi": "vi"}, [], "ir.mkv: one source is a file and the other is not"),
    ({"vi": "small.mkv"}, [], "ir.mkv: ir has 64x64 and vi 32x32 pixels"),
    ({"vi": "fast.mkv"}, [], "ir.mkv: ir has 5 and vi 30 frames a second"),
    ({"ir": "text.mkv"}, [], "text.mkv: cannot be decoded"),
    ({"ir": "gap", "vi": "vi"}, [], "2.png: has no partner"),
    ({"out": "fused.webm"}, [], "fused.webm: no video is written in this format"),
    ({}, ["--ir-contrast", "clahe"], "there is no contrast 'clahe'"),
    ({"method": "mean,ir"}, [], "fused.mkv: is one file for several methods"),
])
def test_refused_in_one_sentence(videos, changes, more, sentence):
    black = [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 4
    write_video(videos / "small.mkv", black, Fraction(5))
    write_video(videos / "fast.mkv", [frame.repeat(1, 2, 2) for frame in black], Fraction(30))
    (videos / "text.mkv").write_text("no video")
    (videos / "gap").mkdir()
    for i in (0, 1, 3): (videos / f"gap/{i}.png").write_bytes((videos / f"ir/{i}.png").read_bytes())
    before = {path: path.read_bytes() for path in videos.rglob("*") if path.is_file()}
    run = caf_fuse(videos, *more, **changes)
    said = [line.split("\r")[-1] for line in run.stderr.splitlines() if "caf-fuse: " in line]
    assert run.exit_code == (2 if "contrast" in sentence else 1) and len(said) == 1 and sentence in said[0]
    assert {path: path.read_bytes() for path in videos.rglob("*") if path.is_file()} == before


def test_the_shorter_one_ends_it(videos):
    write_video(videos / "short.mkv", [(vi * 255).to(torch.uint8) for _, vi in SCENES[:3]], Fraction(5))
    run = caf_fuse(videos, vi="short.mkv")
    assert run.exit_code == 0 and "short.mkv: it ends after 3 frames; what follows in ir.mkv is left out" in run.stderr
    assert len(frames(videos / "fused.mkv")) == 3
