"""The public names: these imports work in every version, wherever the code moves inside the package."""

import importlib
import subprocess
import sys

import pytest

import caf_nb

API = {
    "core": "seed_everything device CafError",
    "config": "Profile DataSettings SearchSettings FusionSettings DetectorSettings SegmenterSettings PretrainSettings",
    "data": "read_pair PairFolder Scene rgb_to_ycbcr ycbcr_to_rgb M3FD MFNet Multispectral TNO RoadScene MSRS",
    "synth": "SynthScenes",
    "losses": "TERMS LossSpace saliency_weights",
    "fusion": "FusionNet load_fusion fuse fuse_folder",
    "zoo": "METHODS",
    "tasks": "Task Detector Segmenter DeepLab",
    "search": "hypergradient search SearchResult",
    "train": "train_fusion finetune_detector finetune_segmenter",
    "fusion_metrics": "FusionMetric MutualInformation StandardDeviation VisualInformationFidelity SumOfCorrelationsOfDifferences",
    "zoo.export": "to_onnx run_onnx FusionModel save_model",
    "metrics": "mutual_information standard_deviation visual_information_fidelity sum_of_correlations_of_differences evaluate_fusion",
    "stages": "Search TrainFusion FuseDataset FinetuneDetector FinetuneSegmenter",
    "report": "paper_table compare",
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in API.items() for name in names.split()])
def test_public_name(module, name):
    assert getattr(importlib.import_module(f"caf_nb.{module}"), name) is not None


def test_names_at_the_top():
    "`caf_nb.<Tab>` shows them all, and `import caf_nb` imports none of them."
    code = "import sys, time; t = time.perf_counter(); import caf_nb; t = time.perf_counter() - t; sys.exit(not (t < 0.3 and 'fuse' in dir(caf_nb) and 'torch' not in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert {"fuse", "load_fusion", "SynthScenes", "SearchResult", "evaluate_fusion"} <= set(dir(caf_nb))
    for name in set(dir(caf_nb)) - {"widgets"}: assert getattr(caf_nb, name) is not None
    with pytest.raises(AttributeError): caf_nb.fuze


def test_profiles_are_configuration():
    "`Profile` belongs to config alone."
    assert not hasattr(importlib.import_module("caf_nb.core"), "Profile")


@pytest.mark.parametrize("module", API)
def test_every_listed_name_exists(module):
    "`__all__` lists nothing that is not there."
    found = importlib.import_module(f"caf_nb.{module}")
    assert set(found.__all__) <= set(vars(found))


@pytest.mark.parametrize("before, bars", [("None", "tqdm.auto"), ("os.environ['CAF_TEXT_BARS'] = '1'", "tqdm.std"), ("sys.modules['ipywidgets'] = None", "tqdm.asyncio")],
                         ids=["widgets", "kernels of caf-report", "ipywidgets is missing"])
def test_bars_of_a_kernel(before, bars):
    "Widgets, or text where nobody sees widgets; never a warning. PyTorch is left out, for speed."
    code = f"import os, sys; from unittest.mock import MagicMock; sys.modules |= {{n: MagicMock() for n in ('torch', 'ipykernel.zmqshell')}}; import IPython; {before}; from caf_nb.core import tqdm; print(tqdm.__module__)"
    done = subprocess.run([sys.executable, "-W", "error:::tqdm", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{bars}\n", "")
