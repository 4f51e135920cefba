"""Hostile and broken files, made by code: checkpoints, pictures and labels. `tools/faults.py` puts all of them through every reader and command, and test_corpus.py a draw."""

import builtins
import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from safetensors.torch import save as safe
from torch import nn

Make = dict[str, Callable[[Path], object]]  # name of the file -> writes it


def content(raw: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(raw.encode() if isinstance(raw, str) else raw)


def flips(raw: bytes, n: int, seed: int) -> Iterator[bytes]:
    draw = random.Random(seed)
    for _ in range(n):
        damaged = bytearray(raw)
        for _ in range(4): damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


# Checkpoints


class Call:
    "Pickles as a call of `function` with `arguments`."

    def __init__(self, function, *arguments): self.function, self.arguments = function, arguments
    def __reduce__(self): return self.function, self.arguments


class State:
    "Pickles as an object of `kind` whose state is `state`."

    def __init__(self, kind, state): self.kind, self.state = kind, state
    def __reduce__(self): return self.kind, (), self.state


def saved(value, old: bool = False) -> bytes:
    torch.save(value, file := io.BytesIO(), _use_new_zipfile_serialization=not old)
    return file.getvalue()


def program(code: bytes) -> bytes:
    "A checkpoint whose pickle is `code`."
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def called(module: str, name: str, *words: str) -> bytes:
    "A pickle that calls module.name with texts."
    return b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{name}\n".encode() + b"(" + b"".join(b"X" + struct.pack("<I", len(w)) + w.encode() for w in words) + b"tRs."


def header(entries: dict | bytes, rest: bytes = b"", size: int | None = None) -> bytes:
    "A file of safetensors with this header."
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


def checkpoints(owned: Path) -> Make:  # `owned`: what the code in them would write
    touch, own = f"touch {owned}", f"open({str(owned)!r}, 'w')"
    state = OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(2, dtype=torch.int64))
    new, old, plain = saved(state), saved(state, old=True), safe(dict(state))
    calls = {"os.system": (touch,), "posix.system": (touch,), "builtins.eval": (own,), "builtins.exec": (own,), "__builtin__.eval": (own,), "builtins.open": (str(owned), "w"), "io.open": (str(owned), "w"),
             "os.popen": (touch,), "subprocess.getoutput": (touch,), "timeit.timeit": (own,), "runpy.run_path": (str(owned),), "cProfile.run": (own,), "pdb.run": (own,), "code.InteractiveInterpreter": (own,),
             "torch.hub.load": ("a/b", "c"), "torch.load": (str(owned),), "importlib.import_module": ("antigravity",), "pydoc.pipepager": ("a", touch), "torch.nn.modules.module.exec": (own,),
             "torch.nn.Module.__init_subclass__": (), "numpy.load": (str(owned),), "shutil.rmtree": (str(owned.parent),), "webbrowser.open": ("http://127.0.0.1",), "builtins.__import__": ("antigravity",),
             "torch._utils._rebuild_tensor_v2": ("a", "b"), "torch.serialization.load": (str(owned),), "collections.namedtuple": ("A", "b"), "builtins.getattr": ("a", "b"), "operator.methodcaller": ("a",)}
    made: Make = {f"call-{name}.pth": content(program(called(*name.rpartition(".")[::2], *words))) for name, words in calls.items()}
    made |= {f"reduce-{i}.pt": content(saved({"model": nn.Linear(1, 1), "x": Call(f, *a)})) for i, (f, a) in enumerate([(os.system, (touch,)), (builtins.eval, (own,)), (builtins.open, (str(owned), "w"))])}
    made |= {"old-call.pth": content(saved({"a": torch.ones(1), "x": Call(os.system, touch)}, old=True)), "state.pth": content(saved({"x": State(Counter, {"update": print, "__class__": dict})})),
             "setstate.pth": content(program(b"\x80\x02ctorch.nn\nModule\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb."))}
    for name, whole in (("new", new), ("old", old), ("safe", plain)):
        end = {"new": "pth", "old": "pth", "safe": "safetensors"}[name]
        made |= {f"cut-{name}-{share}.{end}": content(whole[:len(whole) * share // 100]) for share in (3, 40, 80, 99)}
        made |= {f"flip-{name}-{i}.{end}": content(damaged) for i, damaged in enumerate(flips(whole, 4, seed=7))}
    wide = torch.zeros(1).expand(2**20, 2**20)
    made |= {"stride0.pth": content(saved({"a": wide})), "stride0-old.pth": content(saved({"a": wide}, old=True)), "views.pth": content(saved([*map(torch.zeros(250_000).narrow, [0] * 500, range(500), range(250_000, 249_500, -1))])),
             "wide-module.pth": content(saved({"model": State(nn.Linear, {"in_features": 30000, "out_features": 30000, "_parameters": {}, "_buffers": {}, "_modules": {}})})),
             "long-name.pth": content(saved({"a" * 10**6: [torch.zeros(1)] * 1000})), "nan.pth": content(saved({"a": torch.full((3,), float("nan"))})), "script.pth": content(program(b"\x80\x02}.")[:-1]),
             "deep.pth": content(program(b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".")), "grow.pth": content(program(b"\x80\x02]q\x00" + b"(h\x00h\x00lq\x00" * 60 + b".")),
             "memo.pth": content(program(b"\x80\x02Nr\xff\xff\xff\x7f.")), "huge-text.pth": content(program(b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.")),
             "huge-int.pth": content(program(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.")), "huge-frame.pth": content(program(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.")),
             "digits.pth": content(program(b"I" + b"9" * 100_000 + b"\n.")), "no-pickle.pth": content(program(b"")), "persistent.pth": content(program(b"\x80\x02Nq\x00Q.")),
             "self.pth": content(program(b"\x80\x02]q\x00h\x00a.")), "empty.pth": content(b""), "zip-of-nothing.pth": content(b"PK\x05\x06" + bytes(18)), "text.pth": content("weights\n" * 9), "html.pth": content("<!DOCTYPE html>404"),
             "deflated.pth": lambda path: _deflated(path), "safe-huge.safetensors": content(header({}, size=2**62)), "safe-long.safetensors": content(header({}, size=10**8)),
             "safe-offsets.safetensors": content(header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]}}, bytes(8))), "safe-shape.safetensors": content(header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8))),
             "safe-overlap.safetensors": content(header({k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}, bytes(8))), "safe-deep.safetensors": content(header(b'{"a":' * 100_000)),
             "safe-type.safetensors": content(header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))), "safe-empty.safetensors": content(header({})), "folder.pth": lambda path: path.mkdir(),
             "loop.pth": lambda path: path.symlink_to(path.name), "nowhere.pth": lambda path: path.symlink_to("absent"), "pipe.pth": os.mkfifo, "device.pth": lambda path: path.symlink_to("/dev/zero"),
             "index-of-any-size.index": content(b"\x00" * 1_500_000), "index.index": content(_footer(2**40)), "model.ckpt.index": content(_footer(3) * 20_000)}
    return made


def _footer(size: int) -> bytes:
    def varint(n: int) -> bytes: return b"".join(bytes([n >> 7 * i & 127 | 128 * (n >> 7 * (i + 1) > 0)]) for i in range(max(n.bit_length() - 1, 0) // 7 + 1))
    handles = varint(0) + varint(8) + varint(0) + varint(size)
    return handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def _deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10**8))


# Pictures


def encoded(image: Image.Image, form: str, **options) -> bytes:
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes: return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros(size: int) -> bytes:
    "So many zeros as zlib packs them: one packed block, again and again."
    if not size: return zlib.compress(b"")
    packer, block = zlib.compressobj(9), min(size, 2**20)
    first, again = (packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    rest = packer.compress(bytes(size % block)) + packer.flush()
    return first + again * (size // block - 1) + rest[:-4] + struct.pack(">I", size % 65521 << 16 | 1)


def png(width: int, height: int, depth: int = 8, colour: int = 0, before: bytes = b"", rows: int | None = None) -> bytes:
    "A PNG of zeros that claims this size; `rows`: that are there."
    data = zeros((min(height, 400) if rows is None else rows) * (1 + width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"") -> bytes:
    "A TIFF with these tags: code -> (type, count, value); `data` begins at byte 8."
    start = 8 + len(data)
    return (b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags))
            + b"".join(struct.pack("<HHII", code, *tag) for code, tag in sorted(tags.items())) + struct.pack("<I", 0))


def layout(width: int, height: int, size: int, **more: int) -> dict[int, tuple[int, int, int]]:
    codes = {"bits": 258, "compression": 259, "photometric": 262, "samples": 277, "orientation": 274}
    found = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, size)}
    return found | {codes[name]: (3, 1, value) for name, value in more.items()}


def array_tiff(array: np.ndarray, **options) -> bytes:
    tifffile.imwrite(file := io.BytesIO(), array, **options)
    return file.getvalue()


@cache
def pictures() -> Make:
    gray = Image.fromarray((np.add.outer(np.arange(48), np.arange(64)) * 2).astype(np.uint8))
    colour, made = Image.merge("RGB", [gray, gray.rotate(180), gray]), Make()
    whole = {"png": encoded(colour, "PNG"), "jpg": encoded(colour, "JPEG"), "bmp": encoded(gray, "BMP"), "tif": array_tiff(np.array(gray)), "lzw.tif": encoded(gray, "TIFF", compression="tiff_lzw")}
    for end, raw in whole.items():
        made |= {f"cut-{share}.{end}": content(raw[:len(raw) * share // 100]) for share in (5, 50, 97)} | {f"flip-{i}.{end}": content(d) for i, d in enumerate(flips(raw, 3, seed=3))}
    bomb = zeros(10**9)
    made |= {"giga.png": content(png(30000, 30000)), "largest.png": content(png(2**31 - 1, 2**31 - 1, rows=0, depth=1)), "144.png": content(png(12000, 12000, rows=12000)), "deep.png": content(png(6000, 6000, 16, 6)),
             "none.png": content(png(0, 5)), "short.png": content(png(64, 48, rows=5)), "text.png": content(png(8, 8, before=chunk(b"zTXt", b"a\0\0" + bomb))), "icc.png": content(png(8, 8, before=chunk(b"iCCP", b"a\0\0" + bomb))),
             "exif.png": content(png(8, 8, before=chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60))), "no-palette.png": content(png(8, 8, 8, 3)), "length.png": content(png(8, 8)[:33] + b"\xff\xff\xff\xffIDAT"),
             "giga.tif": content(tiff(layout(30000, 30000, 8), bytes(8))), "strip.tif": content(tiff(layout(100, 100, len(bomb), compression=8), bomb)), "samples.tif": content(tiff(layout(100, 100, 8, samples=65535), bytes(8))),
             "size.tif": content(tiff(layout(2**32 - 1, 2**32 - 1, 8), bytes(8))), "count.tif": content(tiff(layout(8, 8, 64) | {273: (4, 2**32 - 1, 8)}, bytes(64))), "none.tif": content(tiff(layout(0, 0, 0))),
             "bits.tif": content(tiff(layout(8, 8, 64, bits=37), bytes(999))), "compression.tif": content(tiff(layout(8, 8, 64, compression=50000), bytes(64))), "lzw.tif": content(tiff(layout(800, 800, 64, compression=5), b"\xff" * 64)),
             "turned.tif": content(tiff(layout(8, 8, 64, orientation=77), bytes(64))), "loop.tif": content(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"), "no-tags.tif": content(tiff({})), "many.tif": content(b"II*\0\x08\0\0\0\xff\xff" + bytes(900_000)),
             "cmyk.tif": content(array_tiff(np.zeros((8, 8, 4), np.uint8), photometric="separated")), "int32.tif": content(array_tiff(np.zeros((8, 8), np.int32))), "complex.tif": content(array_tiff(np.zeros((8, 8), np.complex64))),
             "nan.tif": content(array_tiff(np.full((8, 8), np.nan, np.float32))), "inf.tif": content(array_tiff(np.full((8, 8), np.inf, np.float32))), "kelvin.tif": content(array_tiff(np.full((8, 8), 300, np.float32))),
             "volume.tif": content(array_tiff(np.zeros((5, 16, 16), np.uint8), volumetric=True, tile=(16, 16, 16))), "pages.tif": content(array_tiff(np.zeros((5, 8, 8), np.uint8), photometric="minisblack")),
             "cmyk.jpg": content(encoded(colour.convert("CMYK"), "JPEG")), "exif.jpg": content(encoded(colour, "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 80)), "huge.jpg": content(encoded(gray, "JPEG").replace(struct.pack(">HH", 48, 64), struct.pack(">HH", 65500, 65500))),
             "huge.bmp": content(encoded(gray, "BMP")[:18] + struct.pack("<ii", 30000, 30000) + encoded(gray, "BMP")[26:]), "minus.bmp": content(encoded(gray, "BMP")[:18] + struct.pack("<ii", -64, -48) + encoded(gray, "BMP")[26:]),
             "gif.png": content(encoded(gray, "GIF")), "ppm.png": content(b"P6 99999 99999 255\n"), "svg.png": content("<svg/>"), "pdf.png": content(b"%PDF-1.7"), "text-only.png": content("no picture"), "empty.png": content(b""), "zeros.jpg": content(bytes(9999)),
             "folder.png": lambda path: path.mkdir(), "nowhere.png": lambda path: path.symlink_to("absent"), "loop.png": lambda path: path.symlink_to(path.name), "pipe.png": os.mkfifo, "device.png": lambda path: path.symlink_to("/dev/zero"),
             "n" * 251 + ".png": content(b"no"), "esc\x1b[2J\nnext.png": content(b"no"), "secret.png": lambda path: (path.write_bytes(whole["png"]), path.chmod(0))}
    return made


# Labels


VOC = "<annotation><object><name>People</name><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"


def labels() -> Make:
    entity = "".join(f'<!ENTITY {b} "{f"&{a};" * 20}">' for a, b in zip("abcdefg", "bcdefgh"))
    xml = {"entities": f'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">{entity}]><annotation>&h;</annotation>', "file": '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotation>&a;</annotation>', "nan": VOC.format("nan"),
           "huge": VOC.format("1e999"), "underscore": VOC.format("1_0"), "digits": VOC.format("9" * 5000), "hex": VOC.format("0x10"), "empty": "", "deep": "<a>" * 50_000, "wide": "<a/>" * 400_000, "cut": VOC.format(1)[:70], "text": "People 1 2 3 4",
           "names": f"<annotation>{'<object><name>x</name></object>' * 9}</annotation>", "encoding": '<?xml version="1.0" encoding="no-such"?><a/>', "utf7": '<?xml version="1.0" encoding="utf-7"?><a/>', "binary": "\0" * 99, "large": " " * 3_000_000, "stranger": VOC.format(1).replace("People", "\x85\u202e" * 9)}
    txt = {"four": "0 .5 .5 .3", "six": "0 .5 .5 .3 .4 .9", "float": "0.0 .5 .5 .3 .4", "minus": "-1 .5 .5 .3 .4", "class": "9" * 5000 + " .5 .5 .3 .4", "inf": "0 inf .5 .3 .4", "under": "0 1_0 .5 .3 .4", "arabic": "\u0661 .5 .5 .3 .4",
           "pixels": "0 32 32 9 9", "thin": "0 .5 .5 0 .4", "line": "a" * 2_000_000, "escape": "\x1b[2J .5 .5 .5 .5", "null": "0 .5 .5 .3 \0", "latin": "0 .5 .5 .3 .4 \xe9"}
    yaml = {"aliases": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")) + "names: *j", "merge": "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefghi", "bcdefghij")), "depth": "[" * 60_000, "map": "{" * 400,
            "python": "names: !!python/object/apply:os.getcwd []", "number": "names: 3", "keys": "names: {-1: a}", "gap": "names: {0: a, 5: b}", "int": "names: {" + "9" * 5000 + ": a}", "date": "names: [2024-99-99]", "tab": "\tnames: [a]", "sixty": "a: 1:99:" + "9" * 9}
    return {f"{name}.xml": content(text) for name, text in xml.items()} | {f"{name}.txt": content(text.encode("latin-1", "replace") if name == "latin" else text) for name, text in txt.items()} | {
        f"{name}.yaml": content(text) for name, text in yaml.items()} | {"pipe.xml": os.mkfifo, "device.txt": lambda path: path.symlink_to("/dev/zero"), "folder.yaml": lambda path: path.mkdir(), **{f"loop.{end}": lambda path: path.symlink_to(path.name) for end in ("xml", "txt", "yaml")}, "utf16.txt": content("0 .5 .5 .3".encode("utf-16"))}


def write(makes: Make, folder: Path) -> list[Path]:
    "Write the files into a folder."
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in makes.items(): make(folder / name)
    return [folder / name for name in makes]
