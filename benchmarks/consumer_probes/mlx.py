"""Log-probabilities by mlx-lm on the CPU."""

import json
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose files are named after the programs
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

request = json.load(sys.stdin)
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(request["model"]))
model.set_dtype(mx.float32)
answer = {}
for length in request["lengths"]:
    logits = model(mx.array([request["ids"][:length]]))[0, -1].astype(mx.float32)
    values = np.array(logits, dtype=np.float64)
    answer[str(length)] = values - np.log(np.exp(values - values.max()).sum()) - values.max()
np.savez(sys.argv[1], **answer)
