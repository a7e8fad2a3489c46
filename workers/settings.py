"""What a request leaves open, settled by the model's config and the machine; and what neither can do, refused."""

from __future__ import annotations

import gc
import os
import platform
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from searcher.errors import LongRopeError
from workers.attention import NAME

if TYPE_CHECKING:
    from workers.model import ModelRequest

ATTENTIONS = ("auto", NAME, "sdpa", "eager", "flash_attention_2", "flash_attention_3")
# Tokens that go through a layer at one time, where nothing else is asked for.
CHUNK = {"cpu": 1024}
CHUNK_ELSEWHERE = 8192
MIN_CHUNK = 256  # below it pieces are too small to keep a device busy; too little memory is then said
# Eager attention holds heads x L x L weights; beyond this length that is no longer a working size.
EAGER_MAX_LENGTH = 8192
# Windowed attention without a flash kernel needs an L x L mask, in float32 with its copies 5.3 bytes an entry as
# Families whose attention is written into them, with no way in for another function.
OWN_ATTENTION = ("falcon", "gptj", "codegen")
# Families whose attention is not told the window: only a mask knows it.
MASKED_WINDOWS = ("phimoe", "qwen2_moe", "doge")
# measured: 1.4 GB at this length, beyond which it is refused.
MASK_MAX_LENGTH = 16384
# A window longer than any target: the way to switch windowed attention off that every family understands.
NO_WINDOW = 2**30


def settle_window(config: Any, request: ModelRequest) -> int | None:
    """Apply --sliding-window to the config; the window in force, or None."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    wish = request.sliding_window
    if wish is not None and wish not in ("keep", "off") and not re.fullmatch(r"[1-9]\d*", wish):
        raise LongRopeError(f"--sliding-window takes keep, off or a number of tokens, not {wish!r}.")
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        if wish not in (None, "keep", "off"):
            raise LongRopeError(
                f"{request.path} attends to all tokens and has no window to set to {wish}; leave --sliding-window out."
            )
        return None
    if wish is None and window < request.target_length:
        raise LongRopeError(
            f"{request.path} attends to a window of {window} tokens, shorter than the target of "
            f"{request.target_length}; choose --sliding-window keep (as trained), off (attend to all) or a number."
        )
    if wish not in ("keep", None):
        window = NO_WINDOW if wish == "off" else int(wish)
    if window >= request.target_length:  # attends to everything: no mask is needed
        config.sliding_window = NO_WINDOW
        return None
    config.sliding_window = window
    return int(window)


def _own_or_whole(config: Any, masked: bool) -> str:
    """Our attention function where the family lets it in and tells it all it needs; else the family's fastest."""
    from transformers import AutoModelForCausalLM

    if config.model_type not in OWN_ATTENTION and not masked:
        return NAME
    family = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "sdpa" if getattr(family, "_supports_sdpa", False) else "eager"


def settle_attention(config: Any, request: ModelRequest, window: int | None) -> str:
    """The attention function's name in transformers; refuses what would need a matrix of queries x keys."""
    if request.attention not in ATTENTIONS:
        raise LongRopeError(f"The attention kernel is one of {', '.join(ATTENTIONS)}, not {request.attention!r}.")
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and request.attention == "sdpa":
        raise LongRopeError(f"{request.path} caps its attention logits, which sdpa cannot do; use --attention {NAME}.")
    masked = window is not None and config.model_type in MASKED_WINDOWS
    attention = request.attention
    if attention == "auto":
        attention = _own_or_whole(config, masked)
    if masked and attention == NAME:
        raise LongRopeError(
            f"{request.path} applies its window by a mask, which {NAME} attention never builds; use "
            "--attention sdpa, or --sliding-window off."
        )
    if attention == "eager" and request.target_length > EAGER_MAX_LENGTH:
        raise LongRopeError(
            f"Eager attention holds all L x L weights and serves targets up to {EAGER_MAX_LENGTH} tokens, "
            f"not {request.target_length}; use --attention {NAME}, or a shorter target."
        )
    if window is not None and attention in ("eager", "sdpa") and request.target_length > MASK_MAX_LENGTH:
        raise LongRopeError(
            f"A window of {window} tokens under {attention} attention needs an L x L mask and serves targets up to "
            f"{MASK_MAX_LENGTH} tokens, not {request.target_length}; use --attention {NAME}, or "
            "--sliding-window off."
        )
    return attention


def settle_chunk(request: ModelRequest, attention: str, device: torch.device) -> int | None:
    """Tokens a piece; None where the attention function needs the sequence whole."""
    if attention != NAME:
        for option in ("chunk", "hidden_on_host", "stream_weights"):
            if getattr(request, option):
                raise LongRopeError(
                    f"With {attention} attention the model runs whole, so {option} does not apply; leave it out, or "
                    f"use --attention {NAME}."
                )
        return None
    if request.chunk is not None and request.chunk < 1:
        raise LongRopeError(f"The chunk is a number of tokens, at least 1, not {request.chunk}.")
    return request.chunk or CHUNK.get(device.type, CHUNK_ELSEWHERE)


def settle_device(device: str) -> torch.device:
    """The device of that name, which must be there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise LongRopeError(f"{device!r} is no device that is served; use auto, cpu, cuda, cuda:N or mps.")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LongRopeError(f"{device} was asked for, but torch {torch.__version__} sees no CUDA device here.")
    return chosen


def prepare_local_ray() -> None:
    """What Ray reads of the environment when it is imported and its processes start, for a cluster of our own.

    It speaks on the loopback interface only, needs a token that no other user of the machine has, and does not yield to
    everything else that runs: Ray's default niceness of 15 makes workers ten times slower beside two busy processes on
    two cores.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def gpu_count() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count()


def free_memory() -> None:
    """Give back what a GPU holds for objects that are gone: the next stage's workers may be other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """What decides the last bits of a score: the card, or the processor with its vector width."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability() + " " + _cpu_model()
    return device.type


def _cpu_model() -> str:
    """The processor's own name; on ARM its implementer and part; else what the platform module knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in named:
            return named["model name"]
        if "CPU part" in named:
            return f"{named.get('CPU implementer', '')} {named['CPU part']} {named.get('CPU variant', '')}".strip()
    return platform.processor() or platform.machine()
