"""Tiny random models with a tokeniser, of every family that is served: complete folders in a tenth of a second.

``python tests/tiny_models.py qwen3 FOLDER`` writes one for people to try the command on.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

WINDOW = 64  # L0
LAYERS = 2
VOCABULARY = 258  # BOS, EOS, and the bytes
BOS, EOS = "<s>", "</s>"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.15,  # far from uniform predictions: a wrong rotation shows in the loss
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "dtype": "float32",
}


def _base(theta: float, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


# What makes a family itself, as far as it touches rotation, attention or logits. Bases differ, so that none passes for
# another, and none is a family's default.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _base(500.0),
    "mistral": {**_base(600.0), "head_dim": 32, "sliding_window": None},
    # All experts of a token: which of them are the best two may hang on the last bit of an angle.
    "mixtral": {**_base(700.0), "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 4},
    "qwen2": _base(800.0),
    "qwen3": {**_base(900.0), "head_dim": 32},
    "phi3": _base(1000.0),
    "gemma2": {
        **_base(1100.0),
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 4096,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "olmo2": _base(1200.0),
    "granite": {
        **_base(1300.0),
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
    },
    "phi": {**_base(1400.0, partial_rotary_factor=0.5), "num_attention_heads": 2},
    "stablelm": {**_base(1500.0, partial_rotary_factor=0.25), "num_attention_heads": 2},
    "cohere": {**_base(1600.0), "logit_scale": 0.5},
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The config of a family, some of its values changed."""
    return AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights, norms and biases among them, that depend on config and seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, after BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([BOS, EOS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def write_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A complete model folder: config, weights as safetensors, tokeniser."""
    random_model(tiny_config(family, **changes), seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def configured(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The same weights under a config that differs: what transformers itself makes of it."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    attention = model.config._attn_implementation
    other = type(model)._from_config(config, attn_implementation=attention, dtype=model.dtype)
    other.load_state_dict(model.state_dict())
    return other.eval()


def window(length: int, seed: int = 0) -> npt.NDArray[np.uint32]:
    """Random tokens, BOS first."""
    tokens = np.random.default_rng(seed).integers(2, VOCABULARY, length).astype(np.uint32)
    tokens[0] = 0
    return tokens


def own_loss(model: PreTrainedModel, tokens: npt.NDArray[np.uint32]) -> float:
    """Mean nats a token as transformers computes them."""
    ids = torch.as_tensor(tokens.astype(np.int64))[None]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_model(arguments.folder, arguments.family)
    print(f"{arguments.folder}: a random {arguments.family} with a window of {WINDOW} tokens")
