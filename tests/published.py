"""Tiny trees in the layouts in which the data sets are published: 48 rows, 64 columns, real formats."""

import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from caf_nb.data import M3FD_CLASSES
from caf_nb.synth import SynthScenes

SIZE = (48, 64)  # rows, columns
N = 8


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def gray(image: torch.Tensor) -> np.ndarray:
    return (image[0] * 255).round().byte().numpy()


def rgb(image: torch.Tensor) -> np.ndarray:
    return (image.expand(3, -1, -1) * 255).round().byte().permute(1, 2, 0).numpy()


def pixel_boxes(scene, classes) -> list[tuple]:
    "(name, xmin, ymin, xmax, ymax) of each box, whole pixels."
    h, w = SIZE
    rows = []
    for k, cx, cy, bw, bh in scene.boxes.tolist():
        rows.append((classes[int(k)], *(round(v) for v in ((cx - bw / 2) * w, (cy - bh / 2) * h, (cx + bw / 2) * w, (cy + bh / 2) * h))))
    return rows


def voc(boxes, size=(64, 48), extra="") -> str:
    "A Pascal VOC file; `size` is (width, height)."
    things = "".join(
        f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<difficult>0</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{a}</xmin>\n"
        f"\t\t\t<ymin>{b}</ymin>\n\t\t\t<xmax>{c}</xmax>\n\t\t\t<ymax>{d}</ymax>\n\t\t</bndbox>\n\t</object>\n" for name, a, b, c, d in boxes)
    return (f"<annotation>\n\t<folder>x</folder>\n\t<size>\n\t\t<width>{size[0]}</width>\n\t\t<height>{size[1]}</height>\n\t\t<depth>3</depth>\n"
            f"\t</size>\n{extra}{things}</annotation>\n")


def m3fd(root: Path, ir="Ir", vi="Vis", labels="Annotation") -> None:
    for i, scene in enumerate(SynthScenes(N, SIZE, seed=5)):
        save(root / ir / f"{i:05d}.png", rgb(scene.ir))
        save(root / vi / f"{i:05d}.png", rgb(scene.vi))
        if labels: write(root / labels / f"{i:05d}.xml", voc(pixel_boxes(scene, M3FD_CLASSES)))


def m3fd_yolo(root: Path) -> None:
    "A converted copy, whose order of classes is another one."
    order = ("people", "car", "bus", "motorcycle", "lamp", "truck")
    write(root / "classes.txt", "\n".join(order))
    for i, scene in enumerate(SynthScenes(N, SIZE, seed=5)):
        save(root / f"ir/{i:05d}.png", gray(scene.ir))
        save(root / f"vi/{i:05d}.png", rgb(scene.vi))
        rows = [f"{order.index(M3FD_CLASSES[int(k)].lower())} {cx:.6f} {cy:.6f} {w:.6f} {h:.6f}" for k, cx, cy, w, h in scene.boxes.tolist()]
        write(root / f"labels/{i:05d}.txt", "\n".join(rows) + "\n")


def mfnet(root: Path) -> None:
    stems = []
    for scene in SynthScenes(N, SIZE, seed=5, task="segmentation"):
        save(root / f"images/{scene.stem}.png", np.dstack([rgb(scene.vi), gray(scene.ir)]))
        save(root / f"labels/{scene.stem}.png", scene.mask.numpy().astype(np.uint8))
        stems.append(scene.stem)
    for part, names in {"train": stems[:4], "val": stems[4:6], "test": stems[6:], "test_day": stems[6:7], "test_night": stems[7:]}.items():
        write(root / f"{part}.txt", "\n".join(names) + "\n")


def multispectral(root: Path) -> None:
    raw = {"Person": "person", "Car": "car", "Bike": "bike", "Cone": "color_cone", "CStop": "car_stop"}
    scenes = SynthScenes(N, SIZE, seed=5, task="multispectral")
    for i, scene in enumerate(scenes):
        boxes = [(raw[name], *rest) for name, *rest in pixel_boxes(scene, scenes.box_classes)] + [("hole", 1, 1, 5, 4)]
        fir, visible = gray(scene.ir), rgb(scene.vi)
        if i == 0: fir[:, :6] = 0
        save(root / f"ConvertedImages/fir/{i:06d}.png", fir)
        save(root / f"ConvertedImages/rgb/{i:06d}.png", visible)
        save(root / f"Images/rgb/{i:06d}.png", visible)  # the raw images of the archive, which nobody asks for
        write(root / f"Annotations_ConvertedSummarized/{i:06d}.xml", voc(boxes, extra="\t<time>day</time>\n"))
        if i % 2: save(root / f"vis_ok/{i:06d}.png", visible)
    write(root / "Annotations_ConvertedSummarized/000099.xml", voc([("car", 1, 1, 9, 9)]))  # labelled, and never warped


def tno(root: Path) -> None:
    scenes = iter(SynthScenes(N, SIZE, seed=5))
    singles = {"Athena_images/lake": ("IR_lake_g.bmp", "VIS_lake_r.bmp"), "Athena_images/bunker": ("IR_bunker_g.bmp", "bunker_r.bmp"),
               "Athena_images/APC_2/view_1": ("2_fk_ge_03_005.bmp", "1_fk_ge_03_005.bmp"), "tank": ("LWIR.tif", "Vis.tif"),
               "DHV_images/wall": ("IR_163rad.bmp", "VIS_163dhvR.BMP"), "Triclobs_images/Farm": ("Farm_IR.bmp", "Farm_Vis.bmp")}
    for folder, (ir, vi) in singles.items():
        scene = next(scenes)
        save(root / folder / ir, gray(scene.ir))
        save(root / folder / vi, gray(scene.vi))
    save(root / "Triclobs_images/Farm/Farm_II.bmp", gray(scene.ir))
    for frame in (7400, 7401):
        scene = next(scenes)
        save(root / f"FEL_images/Duine_sequence/thermal/{frame}i.bmp", gray(scene.ir))
        save(root / f"FEL_images/Duine_sequence/visual/{frame}v.bmp", gray(scene.vi))
    write(root / "README.txt", "about the data")


def roadscene(root: Path) -> None:
    for scene in SynthScenes(N, SIZE, seed=5):
        save(root / f"cropinfrared/FLIR_{scene.stem}.jpg", gray(scene.ir), quality=95)
        save(root / f"crop_LR_visible/FLIR_{scene.stem}.jpg", rgb(scene.vi), quality=95)
        save(root / f"crop_HR_visible/FLIR_{scene.stem}.jpg", np.asarray(Image.fromarray(rgb(scene.vi)).resize((130, 100))))
        save(root / f"infrared/FLIR_{scene.stem}.png", gray(scene.ir)[:40])
    (root / "crop_LR_visible/Thumbs.db").write_bytes(b"\0")


def msrs(root: Path) -> None:
    for i, scene in enumerate(SynthScenes(N, SIZE, seed=5, task="segmentation")):
        part, stem = ("train", scene.stem) if i < 4 else ("test", scene.stem) if i < 6 else ("detection", str(i))
        save(root / part / f"ir/{stem}.png", gray(scene.ir))
        save(root / part / f"vi/{stem}.png", rgb(scene.vi))
        if part == "detection": write(root / f"detection/labels/{stem}.txt", "0 0.5 0.5 0.2 0.2\n1 0.25 0.5 0.1 0.3\n")
        else: save(root / part / f"Segmentation_labels/{stem}.png", scene.mask.numpy().astype(np.uint8))
    write(root / "visualize.py", "")


TREES = {"m3fd": m3fd, "mfnet": mfnet, "multispectral": multispectral, "tno": tno, "roadscene": roadscene, "msrs": msrs}


def bomb(path: Path) -> None:
    "A PNG of 70 bytes that claims to be 60,000 pixels high and wide."
    def chunk(kind, data): return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b""))


def film(root: Path, places: int, frames: int) -> None:
    "An M3FD tree in which each place is seen in several frames that hardly differ."
    for place, scene in enumerate(SynthScenes(places, SIZE, seed=9)):
        generator = torch.Generator().manual_seed(place)
        for k in range(frames):
            stem = f"{place * frames + k:05d}"
            for kind, image in (("Ir", scene.ir), ("Vis", scene.vi)):
                light = 0.85 + 0.15 * torch.rand(1, generator=generator)
                noise = 0.03 * torch.randn(image.shape, generator=generator)
                save(root / kind / f"{stem}.png", rgb((image.roll(k // 2, 2) * light + noise).clamp(0, 1)))
            write(root / f"Annotation/{stem}.xml", voc([("Lamp", 8, 8, 24, 40)]))


