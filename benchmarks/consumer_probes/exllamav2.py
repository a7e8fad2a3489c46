"""exllamav2's own config reader and get_rope_params on the CPU; its kernels multiply as the formula here does."""

import json
import os
import sys
import types
from pathlib import Path

sys.path.pop(0)  # this folder, whose files are named after the programs
import numpy as np
import torch

request = json.load(sys.stdin)
package = types.ModuleType("exllamav2")  # without its __init__, which builds CUDA kernels
package.__path__ = [str(Path(os.environ["CONSUMER"]) / "exllamav2")]
sys.modules["exllamav2"] = package
extension = types.ModuleType("exllamav2.ext")
extension.exllamav2_ext = extension.none_tensor = None
sys.modules["exllamav2.ext"] = extension
from exllamav2.config import ExLlamaV2Config  # noqa: E402
from exllamav2.rope import get_rope_params  # noqa: E402

answer = {}
for length, rows in request["queries"].items():
    config = ExLlamaV2Config(request["model"])
    if request["switches"] and int(length) <= request["original"]:
        config.max_seq_len = request["original"]  # what a user sets for short text
    frequencies, factor = get_rope_params("cpu", config, config.rotary_embedding_base)
    angle = torch.arange(int(length)).double()[:, None] * frequencies.double()
    first, second = torch.tensor(rows, dtype=torch.float64).chunk(2, dim=-1)
    cos, sin = angle.cos() * factor, angle.sin() * factor
    answer[length] = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).numpy()
for length in request["starts"]:  # what a user may start it for instead
    config = ExLlamaV2Config(request["model"])
    config.max_seq_len = length
    answer[f"factor-{length}"] = np.float64(get_rope_params("cpu", config, config.rotary_embedding_base)[1])
np.savez(sys.argv[1], **answer)
