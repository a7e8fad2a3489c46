"""exllamav3's own read_rope_settings_default and RoPE on the CPU."""

import json
import os
import sys
import types
from pathlib import Path

sys.path.pop(0)  # this folder, whose files are named after the programs
import numpy as np
import torch

request = json.load(sys.stdin)
root = Path(os.environ["CONSUMER"]) / "exllamav3"
for name in ("exllamav3", "exllamav3.util", "exllamav3.model"):  # without __init__, which builds CUDA kernels
    package = types.ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = package
for name, attribute in (("exllamav3.ext", "exllamav3_ext"), ("exllamav3.loader", "SafetensorsCollection")):
    module = types.ModuleType(name)
    setattr(module, attribute, None)
    sys.modules[name] = module
backend = types.ModuleType("exllamav3.util.backend")
backend.INT8_GEMV_MODE = None
sys.modules["exllamav3.util.backend"] = backend
from exllamav3.model.config import Config  # noqa: E402
from exllamav3.util.rope import RoPE, RopeStyle  # noqa: E402

document = json.loads((Path(request["model"]) / "config.json").read_text())
reading = types.SimpleNamespace(config_dict=document, head_dim=document["head_dim"])
answer = {}
for length, rows in request["queries"].items():
    settings = Config.read_rope_settings_default(reading, RopeStyle.NEOX)
    if int(length) <= request["original"]:
        settings.override_max_position_embeddings = request["original"]  # what a user sets for short text
    rope = RoPE("cpu", settings)
    sin, cos = rope.compute_sincos(torch.arange(int(length)))
    queries = torch.tensor(rows, dtype=torch.float64)
    half = queries.shape[-1] // 2
    turned = torch.cat([-queries[:, half:], queries[:, :half]], dim=-1)
    answer[length] = (queries * cos + turned * sin).numpy()
np.savez(sys.argv[1], **answer)
