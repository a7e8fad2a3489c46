"""Log-probabilities by llama.cpp, in a context of the length asked for."""

import json
import sys

sys.path.pop(0)  # this folder, whose files are named after the programs
import numpy as np
import xllamacpp

request = json.load(sys.stdin)
settings = xllamacpp.CommonParams()
settings.model.path = request["model"]
settings.n_ctx, settings.n_parallel, settings.warmup = request["context"], 1, False
settings.cpuparams.n_threads, settings.n_gpu_layers = 2, 0
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
answer = {}
for length in request["lengths"]:
    asked = {
        "prompt": request["ids"][:length],
        "n_predict": 1,
        "n_probs": 1024,
        "temperature": 0,
        "cache_prompt": False,
    }
    (token,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    values = np.full(1024, np.nan)
    for candidate in token["top_logprobs"]:
        values[candidate["id"]] = candidate["logprob"]
    assert np.isfinite(values).all()
    answer[str(length)] = values
np.savez(sys.argv[1], **answer)
