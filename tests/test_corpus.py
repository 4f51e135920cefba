"""A draw of the corpus of hostile and broken files (tools/faults.py runs all of it), and fuzz: a reader gives what it read, or one good sentence; no code of a file runs."""

import json
import resource
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import corpus  # noqa: E402
from caf_nb.core import CafError  # noqa: E402
from caf_nb.data import image_size, read_image  # noqa: E402
from faults import checkpoint_readers, label_readers, picture_readers, tried  # noqa: E402

pytestmark = [pytest.mark.disable_socket, pytest.mark.filterwarnings("ignore")]
BOUNDED = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judged(files, readers) -> list[str]:
    "What is neither read nor refused well."
    return [f"{file.name[:60]!a}, {name}: {found}" for file in files for name, reader in readers.items() if (found := tried(reader, file)).startswith("else")]


def test_the_corpus_is_as_large_as_promised(tmp_path):
    assert len(corpus.checkpoints(tmp_path / "owned")) >= 60 and len(corpus.pictures()) >= 60 and len(corpus.labels()) >= 30


def test_checkpoints(tmp_path):
    """Every file through the two cheap readers, a few through one that builds a network. Code did not run, and 500 MB were enough.
    Taken out: `_LONGEST`. Then long-name.pth alone took a gigabyte."""
    before, readers = peak(), checkpoint_readers(tmp_path)
    files = corpus.write(corpus.checkpoints(tmp_path / "owned"), tmp_path / "files")
    assert judged(files, cheap(readers, "read_tensors,read_state,SearchResult")) == []
    assert judged(files[::30], cheap(readers, "caf,FusionModel")) == []
    assert not (tmp_path / "owned").exists() and peak() - before < 500


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory): return corpus.write(corpus.pictures(), tmp_path_factory.mktemp("pictures") / "files")


def test_pictures(tmp_path, picture_files):
    """Every file through the readers, some through caf-fuse.
    Taken out: `realpath` in `_targets`, with `resolve` in its place. Then a link to itself was a RuntimeError, and no pair was fused."""
    before, readers, files = peak(), picture_readers(tmp_path), picture_files
    assert judged(files, {name: reader for name, reader in readers.items() if "caf" not in name}) == []
    assert judged([*files[::27], *(file for file in files if file.stem in ("loop", "n" * 251))], cheap(readers, "caf-fuse")) == []
    assert peak() - before < 500


def test_labels(tmp_path):
    "Every file but one, which takes a second, through every reader; a few through the commands."
    before = peak()
    files, readers = corpus.write(corpus.labels(), tmp_path / "files"), label_readers(tmp_path)
    assert judged([file for file in files if file.name != "depth.yaml"], READERS["label"]) == [] and judged(files[::16], cheap(readers, "caf-data check --split,caf-search")) == []
    assert peak() - before < 500


def test_nothing_is_printed_by_decoders(picture_files, capfd):
    "libtiff's own lines, for example."
    for file in picture_files: tried(read_image, file)
    assert capfd.readouterr().err == ""


def test_the_limit_can_be_raised(tmp_path, monkeypatch):
    "By an argument and by the variable, of every reader."
    (tmp_path / "a.png").write_bytes(corpus.png(1000, 400))
    for call in (read_image, image_size):
        with pytest.raises(CafError, match="claims 1000x400 pixels of 1 bytes, and the limit is 399,999"): call(tmp_path / "a.png", 399_999)
        call(tmp_path / "a.png", 400_000)
    monkeypatch.setenv("CAF_NB_MAX_PIXELS", "399999")
    with pytest.raises(CafError, match="CAF_NB_MAX_PIXELS"): image_size(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(corpus.png(20_000, 10_000, depth=1, rows=0))
    assert image_size(tmp_path / "b.png", 200_000_000) == (20_000, 10_000)


# Fuzz


def small_picture(form: str) -> bytes:
    image = corpus.Image.fromarray(np.arange(70, dtype=np.uint8).reshape(7, 10) * 3)
    return corpus.encoded(image, form.partition("-")[0], **({"compression": "tiff_lzw"} if form.endswith("lzw") else {}))


SEEDS = {"picture": [small_picture(form) for form in ("PNG", "JPEG", "BMP", "TIFF", "TIFF-lzw", "GIF")],
         "checkpoint": [corpus.saved({"a": torch.ones(2, 3)}), corpus.saved({"a": torch.ones(2, 3)}, old=True), corpus.safe({"a": torch.ones(2, 3)}), corpus.program(corpus.called("collections", "OrderedDict"))],
         "label": [corpus.VOC.format(1).encode(), b"0 .5 .5 .3 .4\n", b"names: {0: a, 1: b}\ntrain: x\n", b"dataset,stem,top,left,size\na,b,1,2,3\n",
                   b"# caf_nb split of m3fd, version 1: seed 0, ratio 1 1 1 (train val test)\ntrain 0 a\n", b'{"stage": "a", "values": {"mAP": 1.5}, "provenance": {}, "configuration": {}, "environment": {}}']}
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), st.one_of(st.binary(max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<I", 2**31), b"9" * 40, b"nan", b"1e999", b"\n"]))), max_size=6)


@st.composite
def damaged(draw, kind: str) -> bytes:
    "A right file with a few pieces replaced, or any bytes."
    raw = draw(st.sampled_from([*SEEDS[kind], draw(st.binary(max_size=60))]))
    for place, drop, piece in draw(EDITS):
        at = int(place * len(raw))
        raw = raw[:at] + piece + raw[at + drop:]
    return raw


def cheap(readers, names: str): return {name: readers[name] for name in names.split(",")}


READERS = {"picture": {"read_image": read_image, "image_size": image_size}, "checkpoint": cheap(checkpoint_readers(Path()), "read_tensors,read_state,SearchResult"),
           "label": cheap(label_readers(Path()), "VOC,YOLO,names,split,blocks,own data,SearchResult,cell")}


@pytest.mark.parametrize("kind", SEEDS)
def test_fuzz(tmp_path, kind):
    "Whatever a reader raises that is no CafError fails."
    @BOUNDED
    @given(damaged(kind))
    def one(raw: bytes) -> None:
        (tmp_path / "a").write_bytes(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert judged([tmp_path / "a"], READERS[kind]) == []
    one()


# Fuzz of what stands in a YAML or JSON file of the right form


WORDS = st.one_of(st.sampled_from(["ir", "vi", "..", "", "a", "1_0", "\x1b[2J", "é" * 200, "9" * 5000]), st.text(max_size=6))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10 ** 4000, -1, 2**63]))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.dates()), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(WORDS, NUMBERS, st.none()), inner, max_size=3)), max_leaves=6)


def mapping(*keys: str): return st.fixed_dictionaries({}, optional=dict.fromkeys([*keys, "unknown"], VALUES))


CELL = {"stage": "a", "values": {"mAP": 1.5}, "provenance": {"a": "b"}, "configuration": {}, "environment": {}}
FOUND = {"alpha": [0.0] * 15, "columns": ["loss"], "history": [{"loss": 1.0}], "converged": False, "weights": {}}


def as_json(value) -> str: return json.dumps(value, default=str, skipkeys=True)


DOCUMENTS = {"yaml": (mapping("names", "path", "ir", "vi", "labels", "masks", "train", "val", "test", "nc", "start"), lambda given: yaml.dump({"names": ["a", "b"]} | given), "names,own data"),
             "cell": (mapping(*CELL), lambda given: as_json(CELL | given), "cell"), "loss": (mapping(*FOUND), lambda given: as_json(FOUND | given), "SearchResult")}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_fuzz_of_documents(tmp_path, kind):
    "Known keys with values of any kind."
    values, write, readers = DOCUMENTS[kind]
    @BOUNDED
    @given(values)
    def one(given) -> None:
        (tmp_path / "a").write_text(write(given), encoding="utf-8", errors="surrogatepass")
        assert judged([tmp_path / "a"], cheap(READERS["label"], readers)) == []
    one()
