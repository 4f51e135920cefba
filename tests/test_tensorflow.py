"""TensorFlow checkpoints: what TensorFlow writes is read, damage and malice end in a CafError; the published images of its two methods are met.

`bundles/` was written by TensorFlow 2.21 (tf.compat.v1.train.Saver, and tf.train.Checkpoint for `objects`). The writer below makes
files that no TensorFlow would write, with checksums that fit, so that the checks behind the checksums are reached.
"""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio

from caf_nb.core import CafError
from caf_nb.data import luma, read_image, read_pair, to_uint8
from caf_nb.fusion import fuse, load_fusion
from caf_nb.zoo.tensorflow import crc32c, read_tensorflow

BUNDLES = Path(__file__).parent / "bundles"
FLOAT = 1


# --- a writer of tables ---------------------------------------------------------------------------

def varint(value: int) -> bytes:
    more = b""
    while value > 127:
        more, value = more + bytes([value & 127 | 128]), value >> 7
    return more + bytes([value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    return b"".join(varint(n << 3 | 2) + varint(len(v)) + v if isinstance(v, bytes) else varint(n << 3) + varint(v) for n, v in fields)


def mask(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def block(rows: list[tuple[bytes, bytes]], restarts: int = 1) -> bytes:
    "Rows without shared prefixes."
    content = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in rows)
    return content + bytes(4 * restarts) + struct.pack("<I", restarts)


def sealed(content: bytes, compression: int = 0) -> bytes:
    content += bytes([compression])
    return content + struct.pack("<I", mask(content))


def table(*blocks: bytes, compression: int = 0, handles: list[tuple[int, int]] | None = None) -> bytes:
    "Blocks of rows, a block of handles to them, a footer; `handles` overrides where the blocks are said to be."
    out, places = b"", []
    for i, content in enumerate(blocks):
        places.append((len(out), len(content)))
        out += sealed(content, compression)
    rows = [(b"%06d" % i, varint(offset) + varint(size)) for i, (offset, size) in enumerate(handles or places)]
    index = block(rows)
    footer = varint(0) + varint(0) + varint(len(out)) + varint(len(index))
    return out + sealed(index) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def entry(shape=(2,), dtype=FLOAT, shard=0, offset=0, size=8, crc=None, data=bytes(8)) -> bytes:
    dims = b"".join(message((2, message((1, n)))) for n in shape)
    crc = mask(data) if crc is None else crc
    return message((1, dtype), (2, dims), (3, shard), (4, offset), (5, size)) + varint(6 << 3 | 5) + struct.pack("<I", crc)


HEADER = (b"", message((1, 1)))


def bundle(folder: Path, index: bytes, data: bytes = bytes(8)) -> Path:
    (folder / "x.index").write_bytes(index)
    (folder / "x.data-00000-of-00001").write_bytes(data)
    return folder / "x"


# --- what TensorFlow writes -----------------------------------------------------------------------

def test_every_type_and_a_shared_prefix_of_forty_names():
    tensors = read_tensorflow(BUNDLES / "types")
    assert len(tensors) == 51
    for i in range(40):
        assert tensors[f"many/a_rather_long_name_{i:04d}"].item() == i
    for name in ("float32", "float64", "int32", "uint8", "int16", "int8", "int64", "float16", "bool"):
        expected = torch.arange(-2, 4).to(getattr(torch, name)).view(2, 3)
        assert tensors[f"v/{name}"].dtype == expected.dtype and torch.equal(tensors[f"v/{name}"], expected), name
    assert tensors["v/empty"].shape == (0, 3) and tensors["v/scalar"].shape == () and tensors["v/scalar"] == 2.5


def test_bfloat16_two_data_files_and_objects_of_tensorflow_2():
    assert torch.equal(read_tensorflow(BUNDLES / "bf16")["bf"], torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    two = read_tensorflow(BUNDLES / "two.index")
    assert {name: tensor.tolist() for name, tensor in two.items()} == {"a": [1, 2], "b": [3, 4, 5]}
    objects = read_tensorflow(BUNDLES / "objects")
    assert {name.split("/")[0]: tensor.tolist() for name, tensor in objects.items()} == {"m": [1, 2, 3], "step": 3}


def test_a_variable_in_slices_is_refused_by_name():
    with pytest.raises(CafError, match="parts.index: .*stored in slices, which is not supported"):
        read_tensorflow(BUNDLES / "parts")


@pytest.mark.shared
@pytest.mark.parametrize("method, name, parameters", [("sdnet", "IRVIS.model-10", 67_091), ("u2fusion", "model.ckpt", 659_217)])
def test_official_checkpoints(shared, method, name, parameters):
    "Number for number what TensorFlow 2.16 read from them (golden/*/state.safetensors)."
    ours, theirs = read_tensorflow(shared / "weights" / method / name), load_file(shared / "golden" / method / "state.safetensors")
    assert ours.keys() == theirs.keys() and sum(tensor.numel() for tensor in ours.values()) == parameters
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- damage ---------------------------------------------------------------------------------------

def test_the_writer_of_this_file_is_understood(tmp_path):
    index = table(block([HEADER, (b"a", entry())]), block([(b"b", entry(shape=(1, 1), size=4, offset=4, data=bytes(4)))]))
    assert {name: tuple(tensor.shape) for name, tensor in read_tensorflow(bundle(tmp_path, index, bytes(12))).items()} == {"a": (2,), "b": (1, 1)}


@pytest.mark.parametrize("length", [0, 1, 47, 48, 600, 1195])
def test_truncated_index(tmp_path, length):
    whole = (BUNDLES / "types.index").read_bytes()
    with pytest.raises(CafError, match="x.index: cannot be read"):
        read_tensorflow(bundle(tmp_path, whole[:length]))
    with pytest.raises(CafError, match="x.index: cannot be read"):
        read_tensorflow(bundle(tmp_path, whole[len(whole) - length:]))


def test_missing_shard_truncated_shard_wrong_crc(tmp_path):
    for file in BUNDLES.glob("two.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    second = tmp_path / "two.data-00001-of-00002"
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    with pytest.raises(CafError, match="00001-of-00002: the checksum of b is wrong"):
        read_tensorflow(tmp_path / "two")
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CafError, match="two.index: its tensors take 20 bytes, the data files have 19"):
        read_tensorflow(tmp_path / "two")
    (tmp_path / "two.data-00000-of-00002").write_bytes((BUNDLES / "two.data-00000-of-00002").read_bytes() + b"longer")
    with pytest.raises(CafError, match="00001-of-00002: ends at byte 11, but b needs bytes 0 to 12"):
        read_tensorflow(tmp_path / "two")
    second.unlink()
    with pytest.raises(CafError, match="two.data-00001-of-00002: there is no such file"):
        read_tensorflow(tmp_path / "two")


HUGE = 2**63 - 1
HOSTILE = {
    "no header": ([(b"a", entry())], "not of a checkpoint"),
    "nothing": ([HEADER], "holds no tensors"),
    "no shards": ([(b"", b""), (b"a", entry())], "not of a checkpoint"),
    "a million shards": ([(b"", message((1, 10**6))), (b"a", entry())], "not of a checkpoint"),
    "big-endian": ([(b"", message((1, 1), (2, 1))), (b"a", entry())], "big-endian"),
    "shard out of range": ([HEADER, (b"a", entry(shard=3))], "data file 3 of 1"),
    "too large": ([HEADER, (b"a", entry(shape=(1000, 1000)))], "takes 4000000 bytes, not 8"),
    "huge shape": ([HEADER, (b"a", entry(shape=(HUGE, HUGE)))], "too large to be counted"),
    "negative shape": ([HEADER, (b"a", entry(shape=(2**64 - 1,)))], "too large to be counted"),
    "huge size": ([HEADER, (b"a", entry(shape=(HUGE // 4,), size=HUGE // 4 * 4))], "the data files have 8"),
    "huge offset": ([HEADER, (b"a", entry(offset=HUGE))], "ends at byte 8"),
    "nothing times much": ([HEADER, (b"a", entry(shape=(0, HUGE, HUGE), size=0, data=b""))], "too large to be counted"),
    "axes without end": ([HEADER, (b"a", entry(shape=(1,) * 5000))], "5000 axes"),
    "one tensor many times": ([HEADER, *((b"%04d" % i, entry()) for i in range(1000))], "take 8000 bytes, the data files have 8"),
    "unsorted": ([HEADER, (b"b", entry()), (b"a", entry())], "follows"),
    "twice": ([HEADER, (b"a", entry()), (b"a", entry())], "follows"),
    "unknown type": ([HEADER, (b"a", entry(dtype=20))], "type 20"),
    "bytes for a number": ([HEADER, (b"a", message((1, b"x")))], "no number where dtype"),
    "bytes for a dimension": ([HEADER, (b"a", message((1, FLOAT), (2, message((2, message((1, b"xy")), ), (2, message((1, HUGE)))))))], "no number where dim"),
    "a number for a shape": ([HEADER, (b"a", message((1, FLOAT), (2, 8), (5, 8)))], "cannot be read"),
    "no protocol buffer": ([HEADER, (b"a", b"\xff" * 20)], "an integer does not end"),
    "a key of a megabyte": ([HEADER, (b"a" * 2**20, entry())], "outside of its block"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_entries(tmp_path, case):
    rows, says = HOSTILE[case]
    with pytest.raises(CafError, match=says):
        read_tensorflow(bundle(tmp_path, table(block(rows))))


@pytest.mark.parametrize("index, says", [
    (table(block([HEADER, (b"a", entry())]), compression=1), "compressed"),
    (table(block([HEADER, (b"a", entry())], restarts=2)[:-4] + struct.pack("<I", 2**32 - 1)), "restarts"),
    (table(b"\x00\xff\xff\xff\xff\x0f\x00" + bytes(4) + struct.pack("<I", 1)), "outside of its block"),     # a key of 4 GB
    (table(b"\x09\x01\x00a" + bytes(4) + struct.pack("<I", 1)), "outside of its block"),                    # shares what is not there
    (table(b"ab"), "cannot be read"),                                                                       # too small for a block
    (table(block([HEADER, (b"a", entry())]), handles=[(HUGE, 4)]), "cannot be read"),
    (table(block([HEADER, (b"a", entry())]), handles=[(0, 2**62)]), "cannot be read"),
    (table(block([HEADER, (b"a", entry())]), handles=[(0, len(block([HEADER, (b"a", entry())])))] * 500), "follows"),  # one block, 500 times
])
def test_hostile_tables(tmp_path, index, says):
    with pytest.raises(CafError, match=says):
        read_tensorflow(bundle(tmp_path, index))


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
def test_no_damage_gives_anything_but_tensors_or_an_error(tmp_path_factory, flips):
    "Bytes of the entries changed, and the checksums made to fit."
    rows = bytearray(block([HEADER, (b"a", entry()), (b"b", entry(shape=(1, 1), size=4))]))
    for place, bits in flips:
        rows[place % len(rows)] ^= bits
    path = bundle(tmp_path_factory.getbasetemp(), table(bytes(rows)), bytes(12))
    try:
        tensors = read_tensorflow(path)
    except CafError:
        return
    assert all(math.prod(tensor.shape) * tensor.element_size() <= 12 for tensor in tensors.values())


def test_files_of_another_kind(tmp_path):
    (tmp_path / "x.index").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CafError, match="not those of an index"):
        read_tensorflow(tmp_path / "x")
    with pytest.raises(CafError, match="there is no such file.*Give the .index file"):
        read_tensorflow(tmp_path / "weights.pth")
    (tmp_path / "y.index").mkdir()
    with pytest.raises(CafError, match="there is no such file"):
        read_tensorflow(tmp_path / "y")


# --- the two methods whose weights these are ------------------------------------------------------

OFFICIAL = {"sdnet": "IRVIS.model-10.index", "u2fusion": "model.ckpt.index"}
PUBLISHED = {"sdnet": {"stretch": True}, "u2fusion": {"stretch": True, "ir_first": True}}  # how the published images were made
LARGE = ("01", "09", "13", "17", "21", "25", "29", "33")
IMAGES = [("sdnet", name) for name in (*LARGE, "05", "37")] + [("u2fusion", "05"), ("u2fusion", "37")] + [
    pytest.param("u2fusion", name, marks=pytest.mark.slow) for name in ("17", "25")]  # all ten were compared once: 88 to 96 dB


def agreement(shared, method, name, **options) -> float:
    "PSNR in dB between what we fuse of a full-size TNO pair, in eight bits, and the published image."
    pair = read_pair(shared / f"data/tno/ir/{name}.png", shared / f"data/tno/vi/{name}.png")
    net = load_fusion(method, shared / "weights" / method / OFFICIAL[method], **options)
    fused = to_uint8(fuse(net, *(luma(image) for image in pair)))
    published = to_uint8(read_image(shared / f"golden/{method}/fused_tno/{name}.png"))[:1]
    return peak_signal_noise_ratio(published.numpy(), fused.numpy(), data_range=255)


@pytest.mark.shared
@pytest.mark.parametrize("method, name", IMAGES)
def test_published_images(shared, method, name):
    assert agreement(shared, method, name, **PUBLISHED[method]) >= 45


@pytest.mark.shared
@pytest.mark.parametrize("method, options", [("sdnet", {}), ("u2fusion", {"stretch": True}), ("u2fusion", {"ir_first": True})])
def test_published_images_need_their_convention(shared, method, options):
    assert agreement(shared, method, "37", **options) < 40


@pytest.mark.shared
def test_sdnet_takes_apart_what_it_fused(shared):
    "The official decomposition, in which the visible branch is dead: one gray for every picture."
    net = load_fusion("sdnet", shared / "weights/sdnet/IRVIS.model-10", "cpu")
    golden = np.load(shared / "golden/sdnet/io.npz")
    answers = []
    for i in range(3):
        with torch.no_grad():
            parts = net.decompose((torch.from_numpy(golden[f"out_raw{i}"]) + 1) / 2)
        for part, name in zip(parts, ("sept_ir", "sept_vi"), strict=True):
            torch.testing.assert_close(2 * part - 1, torch.from_numpy(golden[f"{name}{i}"]), rtol=0, atol=1e-5)
        assert parts[0].std() > 0.05 > 0.001 > parts[1].std()
        answers.append(parts[1].mean())
    assert max(answers) - min(answers) < 0.003
