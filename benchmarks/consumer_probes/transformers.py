"""Log-probabilities by plain transformers: the request on standard input, the answer as a .npz."""

import json
import sys

sys.path.pop(0)  # this folder, whose files are named after the programs
import numpy as np
import torch
from transformers import AutoModelForCausalLM

request = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(request["model"], torch_dtype=torch.float32).eval()
answer = {}
with torch.inference_mode():
    for length in request["lengths"]:
        logits = model(torch.tensor([request["ids"][:length]])).logits[0, -1].double()
        answer[str(length)] = torch.log_softmax(logits, -1).numpy()
np.savez(sys.argv[1], **answer)
