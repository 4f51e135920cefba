"""Files that want more than to be read: nothing in them is called, nothing outside of them is reached, and nothing that they do not hold fills the memory."""

import inspect
import json
import os
import pickle
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models import vgg16, vgg19

from caf_nb.checkpoints import load_plain, read_tensors
from caf_nb.core import CafError
from caf_nb.fusion import load_fusion
from caf_nb.losses.vgg import load_vgg
from caf_nb.loop import read_state, write_state
from caf_nb.tasks import Detector, Segmenter, contained_ultralytics
from caf_nb.tasks.detector import _detection_network
from caf_nb.hypergradient.oracle import textbook_space

pytestmark = pytest.mark.disable_socket
CLASSES = ("car", "bus")


class Opened:
    "Pickles as the request to open `file` for writing."

    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), "w")


class Shadowed:
    "Pickles as an OrderedDict of `entries` with attributes of its own in front of its methods."

    def __init__(self, entries, *names, method=None): self.entries, self.methods = dict(entries), {name: method or nn.Identity() for name in names}
    def __reduce__(self): return OrderedDict, (), self.methods, None, iter(self.entries.items())


@pytest.fixture
def called(monkeypatch):
    "Arguments of every call of an `nn.Identity`, which all loaders of networks allow, and which stands here for something worse."
    calls = []
    monkeypatch.setattr(nn.Identity, "forward", lambda self, *args: calls.append(args))
    return calls


def network(seed=5):
    with contained_ultralytics(): return _detection_network("yolov5n", CLASSES, seed)


def same(one, other): return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# Detectors


@pytest.mark.parametrize("name", ["state_dict", "float", "is_fused", "parameters", "to", "__class_getitem__", "_remap_cls_by_names", "eval"])
def test_methods_that_a_network_brings_are_not_called(tmp_path, called, name):
    """Taken out: `_trained_network`, with the loader of ultralytics and `source.state_dict()`, `net.load(source)` in its place.
    Then state_dict, float and is_fused were called; the others are here lest they ever are."""
    net = network()
    shadowed = network()
    vars(shadowed)[name] = nn.Identity()
    torch.save({"model": shadowed}, tmp_path / "a.pt")
    assert same(Detector(CLASSES, weights=tmp_path / "a.pt").net, net)
    assert called == []


@pytest.mark.parametrize("name", ["get", "items", "keys", "__getitem__"])
@pytest.mark.parametrize("place", ["checkpoint", "names", "_modules"])
def test_methods_that_a_container_brings_are_not_called(tmp_path, called, name, place):
    """Taken out: as above. Then `get` of the checkpoint, `items` and `keys` of the names and `items` of the modules were called.
    With `tree.items()` for `dict.items(tree)` in `_entries`, an error about a record replaced the weights, since our reader makes a record of an Identity."""
    tree = network()
    if place != "checkpoint": vars(tree)[place] = Shadowed(vars(tree)[place], name)
    torch.save(Shadowed({"model": tree}, name) if place == "checkpoint" else {"model": tree}, tmp_path / "a.pt")
    assert same(Detector(CLASSES, weights=tmp_path / "a.pt").net, network())
    assert called == []


def test_a_network_that_leads_into_eval(tmp_path, monkeypatch):
    """A class of ultralytics as `state_dict`: called without arguments, it reads a description from the current folder and evaluates a line of it.
    Taken out: as above. Then the line was evaluated."""
    with contained_ultralytics():
        from ultralytics.nn.tasks import DetectionModel
    monkeypatch.chdir(tmp_path)
    default = inspect.signature(DetectionModel.__init__).parameters["cfg"].default
    line = f"open({str(tmp_path / 'owned')!r}, 'w')"
    (tmp_path / default).write_text(json.dumps({"nc": 2, "activation": line, "backbone": [[-1, 1, "Conv", [8]]], "head": []}))
    shadowed = network()
    vars(shadowed)["state_dict"] = DetectionModel
    torch.save({"model": shadowed}, tmp_path / "a.pt")
    assert same(Detector(CLASSES, weights=tmp_path / "a.pt").net, network())
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("place", ["model", "ema", "train_args"])
def test_a_call_in_a_detector_is_refused(tmp_path, place):
    "Taken out: the refusal in `find_class`, with `pickle` itself in its place. Then the file was opened."
    torch.save({"model": network(), place: Opened(tmp_path / "owned")}, tmp_path / "a.pt")
    with pytest.raises(CafError, match=r"a\.pt: the checkpoint asks for .*open; only tensors come out"):
        Detector(CLASSES, weights=tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def test_a_package_is_named_but_never_imported(tmp_path, monkeypatch):
    "Taken out: as above. Then the module was imported, and ran."
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Ours: pass\n")
    program = b"\x80\x02}X\x05\x00\x00\x00modelcmodels\nOurs\n)\x81s."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive: archive.writestr("archive/data.pkl", program)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CafError, match="holds no tensors"):
        Detector(CLASSES, weights=tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists() and "models" not in sys.modules


def test_names_that_do_not_fit_the_head(tmp_path):
    "Taken out: `_trained_network`, as above. Then a head of two classes without a name was taken over."
    net = network()
    for names in ({}, {0: "car"}, dict.fromkeys(range(50_000), "car"), "ab", None, {"a": {"b": "c"}}):
        net.names = names
        torch.save({"model": net}, tmp_path / "a.pt")
        with pytest.raises(CafError, match="holds another network"):
            Detector(CLASSES, weights=tmp_path / "a.pt")


# Folders of SegFormer


@pytest.fixture
def folder(tmp_path):
    Segmenter(CLASSES).save(tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("form", ["dots", "absolute", "link"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_stays_in_its_folder(folder, form, name):
    "Taken out: the check for shards outside, or `_folder_tensors` for `from_pretrained(folder)`. Then the file beside the folder was read."
    outside = folder.parent / f"other-{name}"
    if name == "pytorch_model.bin": torch.save(read_tensors(folder / "model.safetensors"), outside)
    else: (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "link").symlink_to(outside)
    listed = {"dots": f"../{outside.name}", "absolute": str(outside), "link": "link"}[form]
    keys = read_tensors(outside)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, listed)}))
    with pytest.raises(CafError, match=r"index\.json: lists a file outside of its folder"):
        Segmenter(CLASSES, weights=folder)
    (folder / "link").unlink()
    outside.rename(folder / "part")
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, "part")}))
    assert same(Segmenter(CLASSES, weights=folder), Segmenter(CLASSES))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "\\u0000"}}', "[" * 9999, "\xff"])
def test_a_broken_index(folder, content):
    "Taken out: the `except` of `_shards`. Then seven kinds of exception came through."
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin1")
    with pytest.raises(CafError, match=r"index\.json: is no list of weight files"):
        Segmenter(CLASSES, weights=folder)


def test_a_config_is_not_opened_and_code_beside_it_does_not_run(folder, tmp_path):
    "Taken out: `config=`, with an auto class and trust in remote code in its place. Then the module was imported."
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    remote = {"model_type": "x", "auto_map": {"AutoConfig": "modeling.A", "AutoModel": "nobody/nothing--modeling.A"}}
    for content in (json.dumps(remote).encode(), pickle.dumps(Opened(tmp_path / "owned")), b"["):
        (folder / "config.json").write_bytes(content)
        assert same(Segmenter(CLASSES, weights=folder), Segmenter(CLASSES))
    assert not (tmp_path / "owned").exists()


def test_a_call_in_a_segmenter_is_refused(folder, tmp_path):
    "Taken out: `read_tensors` for `torch.load`. Then the file was opened."
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1), "b": Opened(tmp_path / "owned")}, folder / "pytorch_model.bin")
    with pytest.raises(CafError, match=r"pytorch_model\.bin: the checkpoint asks for .*open"):
        Segmenter(CLASSES, weights=folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"method": "nobody"}', '{"method": ["caf"]}', '{"method": "caf", "rule": 3}', "[" * 100_000, '{"method": "didfuse"}', "nan", "cut", "pipe"])
def test_a_folder_of_the_hub(tmp_path, content):
    """Taken out: `FusionModel.from_pretrained`. Then exceptions of json, safetensors and the hub came through, weights of CAF became a DIDFuse with random ones,
    and safetensors waited for a pipe."""
    pytest.importorskip("huggingface_hub")
    from caf_nb.zoo.export import FusionModel, save_model
    net = load_fusion("caf", device="cpu")
    if content == "nan": nn.init.constant_(net.out.bias, float("nan"))
    save_model(tmp_path / "net", net, "caf", {})
    if content == "cut": (tmp_path / "net/model.safetensors").write_bytes((tmp_path / "net/model.safetensors").read_bytes()[:-9])
    elif content == "pipe":
        (tmp_path / "net/model.safetensors").unlink()
        os.mkfifo(tmp_path / "net/model.safetensors")
    elif content != "nan": (tmp_path / "net/config.json").write_text(content)
    with pytest.raises(CafError, match="net: (is no folder of save_model|holds weights that are not finite)|is a pipe or a device") as caught: FusionModel.from_pretrained(tmp_path / "net")
    assert len(str(caught.value)) < 400


# VGG


def test_vgg_files(tmp_path):
    """A list, a call and another network. Taken out: `read_tensors` for `torch.load(weights_only=True)`.
    Then the list ended in an AttributeError, and the message about the call told the victim to set `weights_only=False`."""
    file = tmp_path / "vgg.pth"
    for content, cause in (([torch.ones(1)], "not the weights of torchvision's VGG-16"), ({"features.0.weight": torch.ones(1)}, "not the weights of"),
                           ([1, 2], r"cannot be loaded \(holds no tensors\)"), ({"a": Opened(tmp_path / "owned")}, "everything else in the pickle is refused")):
        torch.save(content, file)
        with pytest.raises(CafError, match=rf"vgg\.pth: .*{cause}") as caught:
            load_vgg(file)
        assert "weights_only" not in str(caught.value)
        with pytest.raises(CafError, match=r"vgg\.pth: "):
            textbook_space("paper", file, "none")
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, file, build", [("imagenet", "vgg16-397923af.pth", vgg16), ("vgg19", "vgg19-dcbb9e9d.pth", vgg19)])
def test_vgg_comes_from_the_cache_and_from_nowhere_else(name, file, build, tmp_path, monkeypatch):
    "Taken out: `read_tensors` for `get_state_dict`. Then the first call tried to open a connection, which this test forbids."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CafError, match=rf"{file}: .*there is no such file.*Put https://download\.pytorch\.org/models/{file} into"):
        load_vgg(name)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    features = build(weights=None).features
    torch.save({f"features.{key}": t for key, t in features.state_dict().items()}, tmp_path / "hub/checkpoints" / file)
    found = [load_vgg(name), load_vgg(tmp_path / "hub/checkpoints" / file)]  # by name, and as a file whose network is recognised
    assert all(same(vgg.layers, features[:len(vgg.layers)]) for vgg in found)
    title = "VGG-16" if name == "imagenet" else "VGG-19"  # made here, so that it is not called ImageNet
    assert all(f"({title}, not torchvision's; SHA-256 " in vgg.pretrained for vgg in found)


# States of our own


def read_training(file): return read_state(file, {"a": "b"})


def with_attribute(tensor):
    tensor.cpu = Counter
    return tensor


@pytest.mark.parametrize(
    "state",
    [{"about": {"a": "b"}, "x": Shadowed({}, "get", "keys", method=OrderedDict)}, {"about": {"a": "b"}, "random": with_attribute(nn.Parameter(torch.ones(1)))}],
    ids=["container", "tensor"],
)
def test_states_that_bring_methods(tmp_path, state):
    "Taken out: `_check_plain`. Then the objects were handed on, to an optimiser that asks for `keys` and a generator that asks for `cpu`."
    torch.save(state, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == state.keys()  # the safe mode of PyTorch has nothing against it
    with pytest.raises(CafError, match=r"a\.pt: is no state of a .*with attributes"):
        read_training(tmp_path / "a.pt")


@pytest.mark.parametrize("state", [[], {}, {"about": 3}, {"about": None}, 7, {"about": {"a": "b"}, "x": Opened("never")}])
def test_foreign_states(tmp_path, state):
    "Taken out: the `except Exception` of `read_state`, which every training shares. Then a KeyError and a TypeError came through."
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CafError, match=r"a\.pt: is no state of a "):
        read_training(tmp_path / "a.pt")


def test_our_states_are_plain(tmp_path):
    "What optimisers, schedules and generators keep passes."
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2)).backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    parts = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "random": torch.get_rng_state(), "rows": [(0.5, None)]}
    write_state(tmp_path / "a.pt", {"a": "b"}, **parts)
    assert str(read_state(tmp_path / "a.pt", {"a": "b"})) == str({"about": {"a": "b"}} | parts) == str(load_plain(tmp_path / "a.pt"))


# Memory


def test_views_share_their_storage(tmp_path):
    "Taken out: the one tensor a storage in `_read_zip`. Then each of the 500 views had its own megabyte."
    whole = torch.zeros(250_000)
    torch.save([whole.view(500, 500)] * 2 + [whole[i:] for i in range(500)], tmp_path / "a.pth")
    assert len({t.untyped_storage().data_ptr() for t in read_tensors(tmp_path / "a.pth").values()}) == 1


def test_tensors_are_not_larger_than_their_storage(tmp_path):
    "Taken out: the comparison in `_tensor`. Then a tensor of 2^40 elements came out of 4 bytes."
    for form in (True, False):
        torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "a.pth", _use_new_zipfile_serialization=form)
        with pytest.raises(CafError, match="a tensor is larger than its storage"):
            read_tensors(tmp_path / "a.pth")
        torch.save({"a": torch.zeros(3).expand(1, 3)}, tmp_path / "b.pth", _use_new_zipfile_serialization=form)
        assert read_tensors(tmp_path / "b.pth")["a"].shape == (1, 3)


def test_zip_members_in_members(tmp_path):
    "Taken out: the sum of sizes in `_read_zip`, where Python's zipfile does not look itself. Then 100 storages of a megabyte were read from a file of one."
    def layer(i): return torch._utils._rebuild_tensor_v2, (Reference(str(i)), 0, (1,), (1,), False, OrderedDict())
    class Reference:
        def __init__(self, key): self.key = key
    class Layer:
        def __init__(self, i): self.i = i
        def __reduce__(self): return layer(self.i)
    class Pickler(pickle.Pickler):
        def persistent_id(self, value): return ("storage", torch.ByteStorage, value.key, "cpu", 1) if isinstance(value, Reference) else None
    with (tmp_path / "program").open("wb") as file: Pickler(file, 2).dump([Layer(i) for i in range(100)])
    content, infos = bytes(2**20), []
    for i in range(100):
        infos.append(zipfile.ZipInfo(f"archive/data/{i}"))
        infos[-1].CRC, infos[-1].file_size, infos[-1].compress_size, infos[-1].header_offset = zlib.crc32(content), len(content), len(content), -len(content)
        header = infos[-1].FileHeader()
        infos[-1].header_offset -= len(header)
        content = header + content
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", (tmp_path / "program").read_bytes())
        archive.fp.seek(archive.start_dir)
        archive.fp.write(content)
        archive.start_dir = archive.fp.tell()
        for info in infos:
            info.header_offset += archive.start_dir
            archive.filelist.append(info)
    with pytest.raises(CafError, match="(?i)overlap"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("call", [b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"c__builtin__\nset\n"])
def test_copies_of_copies(tmp_path, call):
    "Taken out: the count in `_allowed`. Then 50,000 containers of 50,000 entries were asked for, and the memory (of 20 GB) ended before they did."
    items = b"".join(b"M" + i.to_bytes(2, "little") + b"K\x00\x86" * (b"Ordered" in call) for i in range(50_000))
    program = b"\x80\x02](" + items + b"e\x85q\x00" + call + b"q\x010](" + b"h\x01h\x00R" * 50_000 + b"e."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive: archive.writestr("archive/data.pkl", program)
    with pytest.raises(CafError, match="more than 100000 entries"):
        read_tensors(tmp_path / "a.pth")


def test_long_names(tmp_path):
    "Taken out: the limit in `_entries`. Then every tensor had a name of a megabyte: 1 GB out of 1 MB."
    torch.save({"a" * 10**6: [torch.zeros(1)] * 1000}, tmp_path / "a.pth")
    with pytest.raises(CafError, match="a name of more than 1000 characters"):
        read_tensors(tmp_path / "a.pth")
