"""The trainings, killed and resumed, in half precision, in parts and in several processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from caf_nb import loop
from caf_nb.core import CafError
from caf_nb.config import DetectorSettings, FusionSettings, SegmenterSettings
from caf_nb.data import M3FD_CLASSES, MFNET_CLASSES
from caf_nb.fusion import FusionNet
from caf_nb.losses import LossSpace
from caf_nb.synth import SynthScenes
from caf_nb.tasks import Detector, Segmenter, contained_ultralytics
from caf_nb.train import caf_recipe, finetune_detector, finetune_segmenter, train_fusion, train_joint, write_yolo_folder

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("kind, kills", [("fusion", 2), ("search", 2), ("detector", 2), *(pytest.param(kind, 4, marks=pytest.mark.long) for kind in ("segmenter", "joint"))])
def test_killed_at_any_moment_it_ends_with_the_same_bits(kind, kills, tmp_path):
    "SIGKILL at random moments: weights, history and scores are those of an uninterrupted training or search. `python tests/killed.py KIND FOLDER 20` kills more often."
    done = subprocess.run([sys.executable, str(ROOT / "tests/killed.py"), kind, str(tmp_path), str(kills)], env=ONE_THREAD, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= kills
    assert max(runs for runs, _ in found["trainings"]) > 1
    assert all(same for _, same in found["trainings"]), found


KILLED_WHILE_WRITING = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from caf_nb.loop import write_state
    file = Path(sys.argv[1]) / "state.pt"
    write_state(file, {"seed": "0"}, weights=torch.ones(1000))
    whole = Path.write_bytes
    def half(part, content):
        whole(part, content[:len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    Path.write_bytes = half
    write_state(file, {"seed": "0"}, weights=torch.zeros(1000))
"""


def test_killed_while_it_writes_the_old_state_is_left(tmp_path):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED_WHILE_WRITING), str(tmp_path)], env=ONE_THREAD, timeout=120)
    assert done.returncode == -9
    file = tmp_path / "state.pt"
    assert len(list(tmp_path.iterdir())) == 2  # the state, and the half of another
    assert torch.equal(loop.read_state(file, {"seed": "0"})["weights"], torch.ones(1000))
    loop.write_state(file, {"seed": "0"}, weights=torch.zeros(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


@pytest.fixture(scope="module")
def scenes():
    return SynthScenes(7, 32, seed=5)[:]


@pytest.fixture(scope="module")
def space():
    return LossSpace("paper")


@pytest.fixture(scope="module")
def yolo_folder(tmp_path_factory, scenes):
    root = tmp_path_factory.mktemp("boxes")
    for split in ("train", "val", "test"):
        write_yolo_folder(root, split, [s.vi for s in scenes], [s.boxes for s in scenes], [s.stem for s in scenes], M3FD_CLASSES)
    return root


class Plain(torch.nn.Module):
    "A fusion network without batch normalisation, whose statistics are those of a part."

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 3, padding=1), torch.nn.Sigmoid())

    def forward(self, ir, vi): return self.layers(torch.cat([ir, vi], 1))


def trained(scenes, space, network=FusionNet, **more):
    torch.manual_seed(0)
    net = network()
    recipe = caf_recipe(space, torch.full((15,), 1 / 15), FusionSettings(epochs=2, batch_size=3, lr=1e-3))
    history = train_fusion(net, scenes, recipe, seed=1, progress=False, **more)
    return net.state_dict(), history.losses


def test_parts_give_the_step_of_the_whole_batch(scenes, space):
    (whole, losses), (parts, again) = trained(scenes, space, Plain), trained(scenes, space, Plain, accumulate=2)
    assert again == pytest.approx(losses, rel=1e-4)
    for name, tensor in whole.items(): torch.testing.assert_close(parts[name], tensor, rtol=0, atol=2e-4)


class Counted(list):
    "Scenes that say in which processes they were read."

    def __init__(self, scenes, file): super().__init__(scenes), setattr(self, "file", file)

    def __getitem__(self, i):
        with self.file.open("a") as file: file.write(f"{os.getpid()}\n")
        return super().__getitem__(i)


def test_workers_change_where_scenes_are_read_and_no_bit(scenes, tmp_path):
    orders = [loop.Order(len(scenes), 3, torch.Generator().manual_seed(0), workers) for workers in (0, 2)]
    read = Counted(scenes, tmp_path / "who")
    alone, ahead = ([[scene.stem for scene in order.read(part)] for _ in range(5)] for order, part in zip(orders, (scenes, read)))
    assert alone == ahead and torch.equal(orders[0].left, orders[1].left)
    assert str(os.getpid()) not in (tmp_path / "who").read_text().split() != []
    orders[1].load_state_dict(orders[0].state_dict())  # in the middle of a pass
    assert [s.stem for s in orders[1].read(scenes)] == [s.stem for s in orders[0].read(scenes)]
    few = FusionSettings(epochs=1, batch_size=3)
    assert few.model_copy(update={"workers": 2})._exca_uid_dict_override() == few._exca_uid_dict_override()


def test_half_precision_reaches_the_network_and_leaves_weights_and_loss_whole(scenes, space, tmp_path):
    "On a CPU, which has bfloat16 but is not given it otherwise; nothing is, unless it asks."
    with patch.object(loop, "half_type", lambda where: torch.bfloat16):
        _, losses = trained(scenes, space)
        net, half = trained(scenes, space, half=True)
        assert trained(scenes, space, half=True, folder=tmp_path, save_every=2)[1] == half
    assert half != losses and half == pytest.approx(losses, rel=0.05)
    assert all(t.dtype == torch.float32 for t in net.values() if t.is_floating_point())
    pairs = [(s.vi, s.mask) for s in SynthScenes(4, 32, seed=5, task="segmentation")]
    settings = SegmenterSettings(model="tiny", steps=3, batch_size=2, lr=1e-3, pretrained=False)
    with patch.object(loop, "half_type", lambda where: torch.bfloat16):
        whole, half = (finetune_segmenter(Segmenter(MFNET_CLASSES), pairs, pairs, settings.model_copy(update={"half": on}), tmp_path / str(on), progress=False)
                       for on in (False, True))  # fmt: skip
    assert half.losses != whole.losses and half.losses == pytest.approx(whole.losses, rel=0.05)


@pytest.mark.parametrize("kind", [torch.bfloat16, None])
def test_half_precision_of_a_joint_training(scenes, space, kind):
    "It reaches the fusion network on a device that has one, and changes nothing on another."
    def losses(half):
        torch.manual_seed(0)
        net, settings = FusionNet(), FusionSettings(epochs=1, batch_size=2, lr=1e-3, half=half)
        found = train_joint(net, Segmenter(MFNET_CLASSES), space, torch.full((15,), 1 / 15), SynthScenes(4, 32, seed=5, task="segmentation")[:], settings, progress=False)
        assert all(p.dtype == torch.float32 for p in net.parameters())
        return found.losses
    with patch.object(loop, "half_type", lambda where: kind):
        whole, half = losses(False), losses(True)
    assert half == pytest.approx(whole, rel=0.05) and (half == whole) == (kind is None)


def test_the_recipe_of_yolov5_is_what_steps(yolo_folder, tmp_path):
    "Recorded at the optimiser itself, whatever ultralytics was told. The folder has one batch, so a step is an epoch; warm-up ends with the fourth step."
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def steps(recipe):
        seen = []
        keys = ("param_group", "lr", "momentum", "weight_decay", "nesterov")
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(
            (type(optimizer).__name__, {g["param_group"]: [g.get(key) for key in keys[1:]] + [len(g["params"])] for g in optimizer.param_groups})))  # fmt: skip
        settings = DetectorSettings(model="yolov5n", epochs=6, batch_size=7, nominal_batch=7, pretrained=False, **recipe)
        try: finetune_detector(Detector(M3FD_CLASSES), yolo_folder, settings, 32, tmp_path / str(recipe), device="cpu", progress=False)
        finally: hook.remove()
        return seen

    found = steps({})
    assert [kind for kind, _ in found] == ["SGD"] * 6
    rates = [0.01 * ((1 - epoch / 6) * 0.99 + 0.01) for epoch in range(6)]
    for i, (_, groups) in enumerate(found):
        warm = min(i / 3, 1)
        for name, start in (("weight", 0), ("bn", 0), ("bias", 0.1)):
            assert groups[name][:2] == pytest.approx([start + warm * (rates[i] - start), 0.8 + warm * 0.137])
            assert groups[name][2:4] == [5e-4 if name == "weight" else 0, True]
    net = Detector(M3FD_CLASSES).net
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.requires_grad]
    assert found[0][1]["bn"][4] == norms and found[0][1]["bias"][4] == norms + sum(m.bias is not None for m in convolutions)
    assert {kind for kind, _ in steps({"recipe": "auto"})} == {"AdamW"}


@pytest.mark.parametrize("wrong", [b"", b"not a state", "truncated"])
def test_a_damaged_state_is_refused_by_name(wrong, scenes, space, yolo_folder, tmp_path):
    def detect():
        settings = DetectorSettings(model="yolov5n", epochs=2, batch_size=7, nominal_batch=7, pretrained=False)
        finetune_detector(Detector(M3FD_CLASSES), yolo_folder, settings, 32, tmp_path / "out", device="cpu", progress=False, folder=tmp_path)

    pairs = [(s.vi, s.mask) for s in scenes]
    for name, train in {
        "fusion.pt": lambda: trained(scenes, space, folder=tmp_path),
        "segmenter.pt": lambda: finetune_segmenter(Segmenter(MFNET_CLASSES), pairs, pairs, SegmenterSettings(model="tiny", steps=1, batch_size=2, pretrained=False),
                                                   tmp_path / "out", progress=False, folder=tmp_path),
        "joint.pt": lambda: train_joint(FusionNet(), Detector(M3FD_CLASSES), space, torch.full((15,), 1 / 15), scenes, FusionSettings(epochs=1, batch_size=7),
                                        progress=False, folder=tmp_path),
        "detector.pt": detect,
    }.items():  # fmt: skip
        file = tmp_path / name
        if wrong == "truncated":
            torch.save({"about": {}}, file)
            os.truncate(file, file.stat().st_size - 10)
        else: file.write_bytes(wrong)
        with pytest.raises(CafError, match=rf"{name}: is no state of a training .* delete the file to start anew"): train()


def test_patience_is_that_of_ultralytics_and_survives_a_kill(yolo_folder, tmp_path):
    "Scores are planted: the first epoch is the best. The state knows, and a training that is resumed after the second epoch stops after the third, too."
    with contained_ultralytics(): from ultralytics.models.yolo.detect import DetectionTrainer

    def scored(trainer):
        fitness = 0.5 - trainer.epoch / 10
        trainer.best_fitness = max(trainer.best_fitness or 0, fitness)
        return {}, fitness

    def run(out, **more):
        settings = DetectorSettings(model="yolov5n", epochs=6, batch_size=7, nominal_batch=7, pretrained=False, patience=2)
        return finetune_detector(Detector(M3FD_CLASSES), yolo_folder, settings, 32, tmp_path / out, device="cpu", select_best=True, progress=False, **more)

    with patch.object(DetectionTrainer, "validate", scored):
        whole = run("whole")
        assert len(whole.losses) == 3 and whole.checkpoint.name == "best.pt" and "3 epochs" in whole.provenance
        assert run("twice", folder=tmp_path / "state").losses == whole.losses
        assert torch.load(tmp_path / "state/detector.pt", weights_only=True)["stopper"] == (0.5, 1, True)
        again = run("twice", folder=tmp_path / "state")  # the third epoch is repeated
    assert again.losses == whole.losses
    best, first = (Detector(M3FD_CLASSES, weights=r.checkpoint).net.state_dict() for r in (again, whole))
    assert all(torch.equal(best[name], first[name]) for name in best)


def test_the_trainer_can_be_sent_to_another_process(yolo_folder, tmp_path):
    "For several cards ultralytics pickles it, which is all of that way that a machine without cards can try."
    cloudpickle = pytest.importorskip("cloudpickle")
    from caf_nb.train.detector import _Given, _run_trainer, _settings, _trainer_class

    detector = Detector(M3FD_CLASSES)
    with contained_ultralytics():
        kind = cloudpickle.loads(cloudpickle.dumps(_trainer_class(_Given(False, tmp_path / "detector.pt", {"seed": "0"}, 1, None, True))))
        options = _settings(yolo_folder / "data.yaml", 32, 7, "cpu", tmp_path / "out", mode="train", model="yolov5n.yaml", epochs=2, patience=0, val=False, amp=False)
        checkpoint, losses, before = _run_trainer(detector, options, kind, False)
    assert checkpoint.exists() and len(losses) == 2 and before == 0
    assert loop.read_state(tmp_path / "detector.pt", {"seed": "0"})["epoch"] == 0


LAUNCHED = """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[2])
    from caf_nb.data import MFNET_CLASSES
    from caf_nb.config import SegmenterSettings
    from caf_nb.losses import LossSpace
    from caf_nb.synth import SynthScenes
    from caf_nb.tasks import Segmenter
    from caf_nb.train import finetune_segmenter
    from test_training import Plain, trained
    import os
    out, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")

    class Cut(list):
        reads = 9
        def __getitem__(self, i):
            self.reads -= 1
            if self.reads < 0: raise KeyboardInterrupt
            return super().__getitem__(i)

    scenes, space = SynthScenes(7, 32, seed=5)[:], LossSpace("paper")
    result = {"plain": trained(scenes, space, Plain), "whole": trained(scenes, space, log=out/"log")}
    try: trained(Cut(scenes), space, folder=out, save_every=1)
    except KeyboardInterrupt: result["cut"] = True
    result["resumed"] = trained(scenes, space, folder=out)
    pairs = [(s.vi, s.mask) for s in SynthScenes(5, 32, seed=5, task="segmentation")]
    judge = Segmenter(MFNET_CLASSES, seed=int(rank))  # the processes start differently, and must not stay so
    found = finetune_segmenter(judge, pairs, pairs, SegmenterSettings(model="tiny", steps=4, batch_size=2, lr=1e-3, pretrained=False), out/"segmenter", progress=True, log=out/"log")
    result["segmenter"] = (judge.net.state_dict(), found.losses)
    torch.save(result, out/f"{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_network(scenes, space, tmp_path):
    """Started by a launcher, without another line of code: the batches of one process, shared; and a state is good for two.
    (`accelerate launch` spreads over graphics cards only; what it calls for them is PyTorch's launcher, which also serves processors.)"""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(LAUNCHED))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program), str(tmp_path), str(ROOT / "tests")]
    done = subprocess.run(command, env=ONE_THREAD | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = trained(scenes, space, Plain)
    for name in ("plain", "whole", "resumed", "segmenter"):
        (weights, losses), (others, theirs) = first[name], second[name]
        assert losses == theirs, name
        trainable = [k for k in weights if "running" not in k and "num_batches" not in k]  # batch statistics are each process's own
        assert all(torch.equal(weights[k], others[k]) for k in trainable), name
    assert first["plain"][1] == pytest.approx(alone[1], rel=1e-4)
    for name, tensor in alone[0].items(): torch.testing.assert_close(first["plain"][0][name], tensor, rtol=0, atol=2e-4)
    assert first["cut"] and second["cut"] and first["resumed"][1] == first["whole"][1]
    assert all(torch.equal(a, b) for a, b in zip(first["resumed"][0].values(), first["whole"][0].values()))
    assert len(list((tmp_path / "log").iterdir())) == 2  # one writer a training, not one a process
    assert done.stderr.count("| 0/4") == 1               # and one bar
    with pytest.raises(CafError, match="processes 2 instead of 1"): trained(scenes, space, folder=tmp_path)
