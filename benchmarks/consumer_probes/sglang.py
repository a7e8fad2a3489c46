"""SGLang's own get_rope and Phi3LongRoPEScaledRotaryEmbedding on the CPU, under a config with the overrides."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Optional, Union

from taken_out import take_out

sys.path.pop(0)  # this folder, whose files are named after the programs
import numpy as np
import torch
from transformers import AutoConfig

request = json.load(sys.stdin)
rotary = Path(os.environ["CONSUMER"]) / "sglang/srt/layers/rotary_embedding"
known = {
    "torch": torch, "math": math, "nn": torch.nn, "logger": logging.getLogger("sglang"), "_ROPE_DICT": {},
    "Any": Any, "Dict": dict, "List": list, "Optional": Optional, "Tuple": tuple, "Union": Union,
}  # fmt: skip
take_out(rotary / "utils.py", ("rotate_neox",), known)
take_out(rotary / "rope_variant.py", ("Phi3LongRoPEScaledRotaryEmbedding",), known)
get_rope = take_out(rotary / "factory.py", ("get_rope", "_get_rope_param", "_get_live_rope_cache_entry"), known)[
    "get_rope"
]
config = AutoConfig.from_pretrained(request["model"])
config.update(request["overrides"])
parameters = config.rope_parameters  # what its llama.py hands over
rope = get_rope(
    config.head_dim,
    rotary_dim=config.head_dim,
    max_position=config.max_position_embeddings,
    base=parameters["rope_theta"],
    rope_scaling=parameters,
    is_neox_style=True,
    dtype=torch.float32,
)
answer = {}
for length, rows in request["queries"].items():
    queries = torch.tensor(rows, dtype=torch.float32)
    answer[length] = rope(torch.arange(int(length)), queries, queries)[0].double().numpy()
np.savez(sys.argv[1], **answer)
