"""The fusion network against the official one, and checkpoints that want to do harm."""

import copyreg
import importlib
import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from caf_nb import checkpoints
from caf_nb.checkpoints import load_tensors, read_tensors
from caf_nb.core import CafError
from caf_nb.data import luma, read_image, read_pair, write_png
from caf_nb.fusion import FusionNet, Source, fuse, fuse_folder, load_fusion, save_fusion
from caf_nb.zoo import METHODS, Method

WEIGHTS = ["weights/caf/Det_final.pth", "golden/caf_det/state.safetensors"]


# ---------------------------------------------------------------- the network

@pytest.mark.shared
@pytest.mark.parametrize("weights", WEIGHTS)
def test_official_outputs(shared, weights):
    "Both forms of the official weights give the official raw output, also at an odd size."
    golden = np.load(shared / "golden/caf_det/io.npz")
    net = load_fusion("caf", shared / weights, "cpu")
    for i in range(3):
        ir, vi, out = (torch.from_numpy(golden[f"{name}{i}"]) for name in ("ir", "vi", "out"))
        with torch.no_grad():
            torch.testing.assert_close(net(ir, vi), out, rtol=0, atol=1e-5)
        torch.testing.assert_close(fuse(net, ir, vi), out.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.shared
@pytest.mark.slow
def test_official_pictures(shared, tmp_path):
    "The published pictures to one gray level, but for the pixels that the official script lets wrap round."
    net = load_fusion("caf", shared / WEIGHTS[0], "cpu")
    folder = shared / "data/m3fd"
    result = fuse_folder(net, folder / "ir", folder / "vi", tmp_path, progress=False)
    assert len(result.done) == 2 and not result.failures
    for path in result.done:
        ir, vi = read_pair(folder / "ir" / path.name, folder / "vi" / path.name)
        with torch.no_grad():
            raw = net(ir[None], luma(vi)[None])[0, 0]
        official = read_image(folder / "fused_official_det" / path.name)
        far = (255 * (read_image(path) - official)).round().abs().amax(0) > 1
        outside = (raw < 0) | (raw > 1)
        wrapped = (255 * raw).to(torch.int32) < 0  # what the C cast to uint8 turns into 250 or so
        print(f"{path.stem}: {int(outside.sum())} outputs outside [0,1], of which {int(wrapped.sum())} wrap; {int(far.sum())} pixels differ")
        assert torch.equal(far, wrapped)
        assert not (far & ~outside).any()
        assert 0 < outside.sum() <= 10 and raw.numel() == 1024 * 768


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("name, pairs", [("tno", 3), ("roadscene", 4), pytest.param("msrs", 3, marks=pytest.mark.long), pytest.param("llvip", 2, marks=pytest.mark.long)])
def test_published_folders(shared, tmp_path, name, pairs):
    "Pairs spread over four data sets are fused: gray and colour, odd sizes, 8-bit PNG and JPEG."
    for kind in ("ir", "vi"):
        files = sorted((shared / "data" / name / kind).iterdir())
        (tmp_path / kind).mkdir()
        for file in files[:: len(files) // pairs][:pairs]:
            (tmp_path / kind / file.name).symlink_to(file)
    ir, vi = tmp_path / "ir", tmp_path / "vi"
    result = fuse_folder(load_fusion("caf", shared / WEIGHTS[0]), ir, vi, tmp_path / "out", progress=False)
    assert (len(result.done), result.failures, result.unmatched) == (pairs, [], [])
    for path in result.done:
        source = next(vi.glob(path.stem + ".*"))
        assert read_image(path).shape[1:] == read_image(source).shape[1:]
    print(f"{name}: {pairs} pairs in {result.seconds:.1f} s")


# ---------------------------------------------------------------- reading what torch.save writes

def save(value, path, zipped):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor(tmp_path, zipped):
    base = torch.arange(24.0)
    tensors = {"view": base.view(4, 6).t(), "part": base[5:9], "scalar": torch.tensor(3.5), "empty": torch.empty(0, 3),
               "parameter": nn.Parameter(torch.ones(2)), "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
               **{str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                                                                         torch.int16, torch.int8, torch.uint8, torch.bool)}}
    read = read_tensors(save({"a": [tensors, 7, "text", None]}, tmp_path / "a.pth", zipped))
    assert set(read) == {f"a.0.{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert read[f"a.0.{name}"].dtype == tensor.dtype
        assert torch.equal(read[f"a.0.{name}"], tensor)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_pickled_module(tmp_path, zipped):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ModuleList([nn.PReLU(), nn.Linear(2, 2)]))
    read = read_tensors(save({"net": net}, tmp_path / "a.pth", zipped))
    assert set(read) == {f"net.{name}" for name in net.state_dict()}
    assert all(torch.equal(read[f"net.{name}"], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.shared
@pytest.mark.parametrize("file", ["tardal/tardal.pt", "didfuse/Encoder_weight_IJCAI.pkl", "didfuse/Decoder_weight_IJCAI.pkl", "reconet/params.pth"])
def test_published_state_dicts(shared, file):
    "What PyTorch's own safe mode can read, we read the same."
    theirs = torch.load(shared / "weights" / file, weights_only=True, map_location="cpu")
    theirs = {f"{outer}.{name}": t for outer, inner in theirs.items() if isinstance(inner, dict) for name, t in inner.items()} or theirs
    ours = read_tensors(shared / "weights" / file)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- checkpoints that want to do harm

class Call:
    "Pickles as the request to call `function(*arguments)`, then to set `state`."
    def __init__(self, function, *arguments, state=None): self.parts = (function, arguments, state)
    def __reduce__(self): return self.parts


def attacks(target):
    "Objects whose unpickling by `pickle.load` makes the file `target` or gets hold of a function that could."
    touch = f"touch {target}"
    return {
        "system": Call(os.system, touch),
        "popen": Call(subprocess.Popen, ["touch", str(target)]),
        "eval": Call(eval, f"open({str(target)!r}, 'w')"),
        "exec": Call(exec, f"open({str(target)!r}, 'w')"),
        "open": Call(open, str(target), "w"),
        "getattr": Call(Call(getattr, Call(importlib.import_module, "os"), "system"), touch),
        "import": Call(__import__, "os"),
        "partial": Call(Call(partial, os.system, touch)),
        "map": Call(list, Call(map, os.system, [touch])),
        "hub": Call(torch.hub.load, "nobody/nothing", "model"),
        "torch.load": Call(torch.load, str(target)),
        "state": Call(torch._utils._rebuild_parameter, Call(os.system, touch), False, None),
        "setstate": Call(nn.Conv2d, 1, 1, 1, state={"_parameters": {"a": Call(os.system, touch)}}),
        "reader": Call(pickle.loads, b"cos\nsystem\n(S'true'\ntR."),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", attacks("x"))
def test_attacks_are_refused(tmp_path, monkeypatch, name, zipped):
    target = tmp_path / "owned"
    attack = attacks(target)[name]
    if isinstance(attack.parts[0], Call):  # a function that comes out of another call: only by hand
        path = write(tmp_path / "a.pth", nested(attack), zipped)
    else:
        path = save({"fuse": attack, "x": torch.ones(1)}, tmp_path / "a.pth", zipped)
    with pytest.raises(CafError, match="only tensors come out, everything else in the pickle is refused"):
        read_tensors(path, classes=("models.Ours",))
    with pytest.raises(CafError, match="a.pth"):
        load_fusion("caf", path)
    assert not target.exists()


def nested(attack):
    "The pickle of a call whose function is itself the result of a call."
    function, arguments, _ = attack.parts
    inner, outer = pickle.dumps(function, 2)[2:-1], pickle.dumps(arguments, 2)[2:-1]
    return b"\x80\x02" + inner + outer + b"R."


def write(path, program, zipped):
    "A checkpoint around a hand-made pickle program, without storages."
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", b"3\n")
    else:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        path.write_bytes(checkpoints._LEGACY + pickle.dumps(1001, 2) + pickle.dumps(system, 2) + program + pickle.dumps([], 2))
    return path


def text(word): return b"\x8c" + struct.pack("B", len(word)) + word.encode()


def name_of(module, name): return text(module) + text(name) + b"\x93"  # STACK_GLOBAL


REBUILD = name_of("torch._utils", "_rebuild_tensor_v2")
PROGRAMS = {
    "attribute of an allowed function": name_of("torch._utils", "_rebuild_tensor_v2.__globals__") + b".",
    "attribute of an allowed class": name_of("collections", "OrderedDict.__init__.__class__") + b".",
    "dots in the module": name_of("torch.storage", "os.system") + b".",
    "dunder of a layer": name_of("torch.nn", "Module.__init__.__globals__") + b"(" + text("os") + b"tR.",
    "build on a function": REBUILD + b"N}" + text("__defaults__") + b")s\x86b.",
    "build on a function's dict": REBUILD + b"}" + text("a") + b"K\x01sb.",
    "build on a container class": name_of("collections", "OrderedDict") + b"N}" + text("items") + b"K\x01s\x86b.",
    "build on a storage type": name_of("torch", "FloatStorage") + b"}" + text("a") + b"K\x01sb.",
    "build on a record class": name_of("torch.nn", "Conv2d") + b"N}" + text("__setstate__") + REBUILD + b"s\x86b.",
    "reference that is no storage": b"(" + text("storage") + REBUILD + b"K\x01K\x01K\x01tQ.",
    "reference of an unknown kind": text("file") + b"\x85Q.",
    "text as a reference": b"P/etc/passwd\n.",
    "slot for four billion memos": b"Nr\xff\xff\xff\xff.",
    "extension registry": b"\x82\xf0" + text("true") + b"\x85R.",
    "no stop": b"}",
    "empty stack": b".",
    "append to a layer": name_of("torch.nn", "Conv2d") + b")R" + b"Na.",
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_refused(tmp_path, program, zipped, extension):
    "Pickle programs by hand, with opcodes that torch.save never writes, end in a CafError and leave no trace."
    function, before = torch._utils._rebuild_tensor_v2, dict(vars(torch._utils._rebuild_tensor_v2))
    with pytest.raises(CafError):
        read_tensors(write(tmp_path / "a.pth", b"\x80\x04" + PROGRAMS[program], zipped))
    assert (vars(function), function.__defaults__) == (before, (None,))
    assert not hasattr(checkpoints._Record, "__getattr__")
    assert torch.equal(read_tensors(save({"a": torch.ones(2)}, tmp_path / "b.pth", zipped))["a"], torch.ones(2))


@pytest.fixture
def extension():
    "`os.system` as extension 240, used once elsewhere in this process and therefore in the cache that unpicklers share."
    copyreg.add_extension(os.system.__module__, "system", 240)
    pickle.loads(b"\x80\x02\x82\xf0.")
    yield
    copyreg.remove_extension(os.system.__module__, "system", 240)


def test_trees_without_end(tmp_path):
    "A structure that contains itself, one nested ten thousand times, and one with 2^60 branches."
    loop, deep, wide = {}, [], [torch.ones(1)]
    loop["again"] = loop
    with pytest.raises(CafError, match="cannot be read"):
        read_tensors(save(loop, tmp_path / "a.pth", True))
    for _ in range(60):
        wide = [wide, wide]
    with pytest.raises(CafError, match="more than 100000 entries"):
        read_tensors(save(wide, tmp_path / "b.pth", True))
    with pytest.raises(CafError, match="cannot be read"):
        read_tensors(write(tmp_path / "c.pth", b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".", True))


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("size, stride, offset", [((10**6,), (1,), 0), ((4,), (10**12,), 0), ((2,), (1,), 4), ((2,), (1,), -1), ((-1,), (1,), 0)])
def test_tensors_stay_inside_their_storage(tmp_path, size, stride, offset):
    data = Call(torch._utils._rebuild_tensor_v2, torch.ones(4).storage(), offset, size, stride, False, {})
    with pytest.raises(CafError, match="cannot be read"):
        read_tensors(save_with_storage(data, tmp_path / "a.pth"))


def save_with_storage(call, path):
    "torch.save of {'a': call}, where an argument of the call is a storage."
    program = io.BytesIO()
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, torch.storage.TypedStorage) else None
    Pickler(program, 2).dump({"a": call})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/data/0", np.ones(4, np.float32).tobytes())
    return path


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_storage_helper(tmp_path):
    good = Call(torch._utils._rebuild_tensor_v2, torch.ones(4).storage(), 1, (3,), (1,), False, {})
    assert torch.equal(read_tensors(save_with_storage(good, tmp_path / "a.pth"))["a"], torch.ones(3))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_other_archives(tmp_path):
    "TorchScript holds code, a tar file takes another road in torch.load, a plain pickle is no checkpoint."
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "script.pt")
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "empty.pth").touch()
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "weights")
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": list(range(1000))}))
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(CafError, match=file.name):
            read_tensors(file)
    for missing in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(CafError, match="no such file"):
            read_tensors(missing)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_anywhere(tmp_path, form):
    path = tmp_path / f"a.{'safetensors' if form == 'safetensors' else 'pth'}"
    save_fusion(path, FusionNet(), {}) if form == "safetensors" else save(FusionNet().state_dict(), path, form == "zip")
    content = path.read_bytes()
    for part in (0.999, 0.7, 0.2, 0.02, 0.002):
        path.write_bytes(content[:int(part * len(content))])
        with pytest.raises(CafError, match=path.name):
            load_fusion("caf", path)


def test_damaged_anywhere(tmp_path):
    "A flipped byte gives the tensors or a CafError, never another exception."
    path, generator = tmp_path / "a.pth", np.random.default_rng(0)
    for zipped in (True, False):
        content = save({"a": torch.ones(3), "b": nn.Parameter(torch.ones(2))}, path, zipped).read_bytes()
        for place in generator.integers(0, len(content), 300):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(damaged)
            try: read_tensors(path)
            except CafError: pass


# ---------------------------------------------------------------- loading

def test_a_checkpoint_of_something_else(tmp_path):
    state = {f"layer{i}.weight": torch.zeros(2) for i in range(9)}
    with pytest.raises(CafError, match=r"a\.pth: .*missing: dense\.0.* and 44 more; unexpected: layer0\.weight.* and 7 more\."):
        load_fusion("caf", save(state, tmp_path / "a.pth", True))


def test_a_misfit_changes_nothing():
    net = FusionNet()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(CafError, match="of another shape: out.weight"):
        load_tensors(net, {name: torch.zeros_like(t) for name, t in before.items()} | {"out.weight": torch.zeros(1, 31, 1, 1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_method_is_an_entry(tmp_path, monkeypatch):
    "A new method adds one entry and is loaded, in our format and in its authors' one, and fuses."
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.share = nn.Parameter(torch.tensor(0.5))
        def forward(self, ir, vi): return self.share * ir + (1 - self.share) * vi
    monkeypatch.setitem(METHODS, "mean", Method(Mean, "Mean", convert=lambda state: {"share": state["w"]}))
    ir, vi = torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3)
    assert torch.equal(fuse(load_fusion("mean", save({"w": torch.tensor(0.25)}, tmp_path / "a.pth", True)), ir, vi), torch.full_like(ir, 0.75))
    save_fusion(tmp_path / "b.safetensors", Mean(), {})
    assert torch.equal(fuse(load_fusion("mean", tmp_path / "b.safetensors"), ir, vi), torch.full_like(ir, 0.5))


def test_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_fusion(path, FusionNet(), {"epoch": 1})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    real = Path.write_bytes

    def disk_full(part, data):
        real(part, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(CafError, match="No space left"):
        save_fusion(path, FusionNet(), {"epoch": 2})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before and len(before) == 2


# ---------------------------------------------------------------- folders

@pytest.fixture
def pairs(tmp_path):
    "Three good pairs of 16x24 pixels."
    generator = torch.Generator().manual_seed(0)
    for kind, channels in (("ir", 1), ("vi", 3)):
        (tmp_path / kind).mkdir()
        for i in range(3):
            write_png(tmp_path / kind / f"{i}.png", torch.rand(channels, 16, 24, generator=generator))
    return tmp_path


def test_any_failure_of_one_pair_spares_the_others(pairs):
    class Fragile(nn.Module):
        calls = 0
        def forward(self, ir, vi):
            self.calls += 1
            if self.calls == 2: raise RuntimeError("not enough memory\nat line 7")
            return ir
    (pairs / "out").mkdir()
    (pairs / "out/1.png").write_bytes(b"from yesterday")
    result = fuse_folder(Fragile(), pairs / "ir", pairs / "vi", pairs / "out", progress=False)
    assert [p.name for p in result.done] == ["0.png", "2.png"]
    assert [str(e) for e in result.failures] == [f"{pairs / 'ir/1.png'}: could not be fused (RuntimeError: not enough memory)."]
    assert (pairs / "out/1.png").read_bytes() == b"from yesterday"


def test_a_result_that_cannot_be_written(pairs):
    (pairs / "out/1.png").mkdir(parents=True)
    result = fuse_folder(Source("ir"), pairs / "ir", pairs / "vi", pairs / "out", progress=False)
    assert len(result.done) == 2
    assert "out/1.png: cannot be written" in str(result.failures[0])


def test_sources_are_never_overwritten(pairs):
    "Neither through a link to their folder nor where the sources are links into the output folder."
    (pairs / "link").symlink_to(pairs / "vi")
    (pairs / "links").mkdir()
    for file in (pairs / "ir").iterdir():
        (pairs / "links" / file.name).symlink_to(file)
    for ir, out in (("ir", "link"), ("links", "ir")):
        with pytest.raises(CafError, match="holds the source images"):
            fuse_folder(Source("ir"), pairs / ir, pairs / "vi", pairs / out, progress=False)


def test_interrupt_leaves_whole_pictures(pairs):
    class Interrupted(nn.Module):
        calls = 0
        def forward(self, ir, vi):
            self.calls += 1
            if self.calls == 2: raise KeyboardInterrupt
            return ir
    with pytest.raises(KeyboardInterrupt):
        fuse_folder(Interrupted(), pairs / "ir", pairs / "vi", pairs / "out", progress=False)
    assert {p.name for p in (pairs / "out").iterdir()} <= {"0.png"}
    for path in (pairs / "out").iterdir(): read_image(path)
