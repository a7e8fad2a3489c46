"""A Llama model folder as a GGUF file in float32: what the reference model needs to run in llama.cpp.

Other models are converted by llama.cpp's own script, which drops the factors of their config without a word; the
factors then go into its file with ``patch_gguf``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from searcher.errors import LongRopeError
from storage.checks import read_json
from storage.gguf_file import _replacing, add_factor_tensors, add_factors, gguf_package
from storage.losses import Taken
from storage.model_folder import read_config

# Hugging Face's name within a layer -> GGUF's.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# How a byte-level tokenizer cuts text before merging -> llama.cpp's name for that.
PRE_TOKENIZERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
FLOATS = {"F32": np.float32, "F16": np.float16}


def convert_llama(model_folder: Path, out: Path, taken: Taken) -> None:
    """Weights, tokenizer and factors as one GGUF file, which appears at ``out`` when it is complete.

    Raises
    ------
    LongRopeError
        The folder is no Llama with a byte-level tokenizer, or holds something this does not convert.
    """
    gguf, config = gguf_package(), read_config(model_folder)
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise LongRopeError(
            f"Only Llama models without biases are converted here, not {config.get('model_type')}; convert "
            f"{model_folder} with llama.cpp's convert_hf_to_gguf.py, then give its file with --gguf."
        )
    tokenizer = _tokenizer(model_folder)
    with _replacing(out) as aside:
        writer = gguf.GGUFWriter(aside, "llama")
        _add_shape(writer, config, taken)
        _add_tokenizer(gguf, writer, tokenizer, config)
        add_factors(gguf, writer, "llama", taken)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config.get("num_key_value_heads")}
        heads["attn_k"] = heads["attn_k"] or heads["attn_q"]
        for name, values in _weights(model_folder):
            given = _gguf_name(name)
            if given is None:
                continue
            kind = given.split(".")[-2]
            writer.add_tensor(given, _interleaved(values, heads[kind]) if kind in heads else values)
        add_factor_tensors(writer, taken)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _interleaved(values: np.ndarray[Any, Any], heads: object) -> np.ndarray[Any, Any]:
    """Rows of q or k in the order of llama.cpp's Llama, which turns neighbours together: 0 d/2 1 d/2+1 ..."""
    if not isinstance(heads, int):
        raise LongRopeError("The model's config.json must state num_attention_heads.")
    rows, columns = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _gguf_name(name: str) -> str | None:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    if stem.endswith("rotary_emb.inv_freq"):
        return None  # of old checkpoints; computed anew
    parts = stem.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[2].isdigit() and parts[3] in LAYER:
        return f"blk.{int(parts[2])}.{LAYER[parts[3]]}.weight"
    raise LongRopeError(f"The model has a tensor {name}, which a Llama has not; it cannot be converted.")


def _weights(model_folder: Path) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """All tensors as float32."""
    from safetensors import deserialize

    found = []
    for path in sorted(model_folder.glob("*.safetensors")):
        try:
            tensors: Any = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        except Exception as error:  # safetensors' own error has no public base
            raise LongRopeError(f"{path} cannot be read as safetensors: {error}.") from error
        for name, tensor in tensors:
            kind, data = tensor["dtype"], bytes(tensor["data"])
            if kind == "BF16":  # the upper half of a float32
                values = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
            elif kind in FLOATS:
                values = np.frombuffer(data, dtype=FLOATS[kind]).astype(np.float32)
            else:
                raise LongRopeError(f"{name} in {path} is {kind}; float32, float16 and bfloat16 are converted.")
            found.append((name, values.reshape(tensor["shape"])))
    return found


def _add_shape(writer: Any, config: dict[str, Any], taken: Taken) -> None:
    model = taken.model
    writer.add_name(model.name)
    writer.add_block_count(model.layers)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(model.theta)
    writer.add_rope_dimension_count(model.rotary_dim)
    writer.add_key_length(model.rotary_dim)
    writer.add_value_length(model.rotary_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)  # all of it float32


def _tokenizer(model_folder: Path) -> dict[str, Any]:
    """The tokenizer's vocabulary, merges and how it cuts text."""
    path = model_folder / "tokenizer.json"
    found: Any = read_json(path)
    try:
        model, cutter = found["model"], found["pre_tokenizer"]
        steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
        pre = PRE_TOKENIZERS.get(tuple(step["type"] for step in steps))
        byte_level = model["type"] == "BPE" and not model.get("byte_fallback")
        plain = byte_level and not steps[-1]["add_prefix_space"] and found["normalizer"] is None
        if pre is None or not plain:
            raise LongRopeError(
                f"{path} is no byte-level tokenizer that is known here; convert the model with llama.cpp's "
                "convert_hf_to_gguf.py, then give its file with --gguf."
            )
        special = {token["content"] for token in found["added_tokens"] if token["special"]}
        added = {token["content"]: token["id"] for token in found["added_tokens"]}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return {"vocab": {**model["vocab"], **added}, "merges": merges, "pre": pre, "special": special}
    except (KeyError, TypeError, AttributeError) as error:
        raise LongRopeError(f"{path} is not a tokenizer.json of the form that is known: {error!r}.") from error


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    by_id = {number: token for token, number in tokenizer["vocab"].items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config["vocab_size"])]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            kinds.CONTROL if token in tokenizer["special"] else kinds.NORMAL if number in by_id else kinds.UNUSED
            for number, token in enumerate(tokens)
        ]
    )
    writer.add_token_merges(tokenizer["merges"])
    for name, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if isinstance(config.get(name), int):
            add(config[name])
    writer.add_add_bos_token(isinstance(config.get("bos_token_id"), int))
