"""vLLM's own get_rope and Phi3LongRoPEScaledRotaryEmbedding on the CPU, under a config with the overrides."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from taken_out import take_out

sys.path.pop(0)  # this folder, whose files are named after the programs
import numpy as np
import torch
from transformers import AutoConfig

request = json.load(sys.stdin)
rotary = Path(os.environ["CONSUMER"]) / "vllm/model_executor/layers/rotary_embedding"
logger = logging.getLogger("vllm")
logger.warning_once = logger.warning
answer = {}
for length, rows in request["queries"].items():
    # As its config loader does: the overrides replace keys, then transformers puts the RoPE settings in order.
    config = AutoConfig.from_pretrained(request["model"])
    config.update(json.loads(json.dumps(request["overrides"])))
    config.standardize_rope_params()
    config.validate_rope()
    longest = request["original"] if int(length) <= request["original"] else request["target"]  # --max-model-len
    running = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
    known = {
        "torch": torch, "math": math, "nn": torch.nn, "logger": logger, "Any": Any, "_ROPE_DICT": {},
        "get_current_vllm_config": lambda running=running: running,
    }  # fmt: skip
    take_out(rotary / "common.py", ("rotate_neox",), known)
    take_out(rotary / "phi3_long_rope_scaled_rope.py", ("Phi3LongRoPEScaledRotaryEmbedding",), known)
    get_rope = take_out(rotary / "__init__.py", ("get_rope",), known)["get_rope"]
    rope = get_rope(config.head_dim, config.max_position_embeddings, True, config.rope_parameters, torch.float32)
    queries = torch.tensor(rows, dtype=torch.float32)
    answer[length] = rope(torch.arange(int(length)), queries, queries)[0].double().numpy()
np.savez(sys.argv[1], **answer)
