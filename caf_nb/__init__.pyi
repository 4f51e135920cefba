from . import (
    checkpoints as checkpoints, config as config, core as core, data as data, fusion as fusion, losses as losses,
    metrics as metrics, report as report, search as search, stages as stages, synth as synth, tasks as tasks,
    train as train, widgets as widgets, zoo as zoo,
)
from .config import Profile as Profile
from .core import CafError as CafError, device as device, seed_everything as seed_everything
from .data import (
    M3FD as M3FD, MFNet as MFNet, MSRS as MSRS, Multispectral as Multispectral, PairFolder as PairFolder,
    RoadScene as RoadScene, Scene as Scene, TNO as TNO, read_image as read_image, read_pair as read_pair,
    rgb_to_ycbcr as rgb_to_ycbcr, write_png as write_png, ycbcr_to_rgb as ycbcr_to_rgb,
)
from .fusion import FusionNet as FusionNet, fuse as fuse, fuse_folder as fuse_folder, load_fusion as load_fusion
from .losses import LossSpace as LossSpace, TERMS as TERMS, saliency_weights as saliency_weights
from .metrics import (
    evaluate_fusion as evaluate_fusion, mutual_information as mutual_information,
    standard_deviation as standard_deviation,
    sum_of_correlations_of_differences as sum_of_correlations_of_differences,
    visual_information_fidelity as visual_information_fidelity,
)
from .report import compare as compare, paper_table as paper_table
from .search import SearchResult as SearchResult
from .stages import (
    FinetuneDetector as FinetuneDetector, FinetuneSegmenter as FinetuneSegmenter, FuseDataset as FuseDataset,
    Search as Search, TrainFusion as TrainFusion,
)
from .synth import SynthScenes as SynthScenes
from .tasks import DeepLab as DeepLab, Detector as Detector, Segmenter as Segmenter, Task as Task
from .train import (
    finetune_detector as finetune_detector, finetune_segmenter as finetune_segmenter, train_fusion as train_fusion,
)
from .zoo import METHODS as METHODS

__version__: str
