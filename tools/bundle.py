"""Make caf_nb/weights/caf.safetensors: the network that `load_fusion("caf")` brings when no weights are named.

It has seen 256 synthetic scenes and was trained with equal weights of all fifteen terms (the paper's ablation Ours_A), not with a searched loss: a search with an
untrained detector leans to one source, and what people want from a default is a picture with both. About five minutes on two cores.
Run from the root of the project: .venv/bin/python tools/bundle.py
"""

import json
from pathlib import Path

from caf_nb.checkpoints import checksums
from caf_nb.config import FusionSettings, Profile
from caf_nb.fusion import save_fusion
from caf_nb.losses import TERMS
from caf_nb.stages.sources import Data
from caf_nb.stages import TrainFusion, Weighted

mini = Profile.named("mini")
stage = TrainFusion(data=Data(name="m3fd", settings=mini.data), loss=Weighted(beta=(1 / len(TERMS),) * len(TERMS)),
                    settings=FusionSettings(epochs=5, batch_size=4, lr=1e-3), infra={"folder": "out/cache"})
config = {"note": mini.note, "provenance": stage.provenance(), "stage": stage.infra.config(uid=True, exclude_defaults=False)}
file = Path("caf_nb/weights/caf.safetensors")
save_fusion(file, stage.fusion(), config)
file.with_suffix(".json").write_text(json.dumps({"sha256": checksums(file, file.parent)} | config, indent=1) + "\n")
