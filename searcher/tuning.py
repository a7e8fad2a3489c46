"""One fine-tuning stage as data: what is trained on what, for how long, at which rate. Plain values, no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from searcher.errors import LongRopeError

SCHEDULES = ("linear", "constant", "cosine")
TUNING_DTYPES = ("bfloat16", "float32")
SHORT_TEXTS = ("documents", "windows")
# transformers' names. 8-bit and paged ones need packages of their own, and lose the bit-identity of a resumed run.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd")


@dataclass(frozen=True)
class Tuning:
    """The settings of one fine-tuning stage.

    Attributes
    ----------
    length: tokens of a training chunk and of a held-out window, BOS and EOS included. Not always the length the factors
        are for: the paper tunes Mistral on 16k sequences under the factors of 128k and 256k.
    steps: optimiser steps.
    learning_rate: its peak.
    schedule: after the warm-up: ``linear`` to zero at the last step, ``cosine`` to zero, or ``constant``.
    warmup: steps in which the rate rises from zero; 0 for none.
    batch: chunks a step, over all devices.
    micro_batch: chunks that one device takes through the model at one time.
    weight_decay, max_grad_norm: decoupled decay; norm that gradients are cut to, 0 for no cut.
    optimizer: one of ``OPTIMIZERS``, with transformers' own betas.
    dtype: of forward and backward. ``bfloat16`` is autocast: weights, gradients and optimiser state are float32 anyway.
    lora_rank: None trains all weights; else the rank of LoRA on every linear map but the head (arXiv 2106.09685).
    lora_alpha: LoRA's scale is alpha / rank; None for 2 x rank.
    mixed_window: share of the micro-batches that are short text under the original RoPE (LongRoPE2, arXiv 2502.20082);
        0 for none.
    short_text: what that is: ``documents`` of at most L0 tokens, as in LongRoPE2, or ``windows`` of L0 tokens out of
        all documents, where the text has no short ones.
    gradient_checkpointing: keep only the hidden states between layers, and compute the rest again on the way back.
    save_every, evaluate_every: steps between checkpoints and between held-out evaluations; both also after the last.
    seed: of the data order and of LoRA's first weights.
    fsdp: None for data parallelism; else shard weights and optimiser by FSDP, with these settings of transformers'
        ``TrainingArguments.fsdp_config`` (an empty mapping for its defaults).
    """

    length: int
    steps: int
    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup: int = 20
    batch: int = 32
    micro_batch: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch_fused"
    dtype: str = "bfloat16"
    lora_rank: int | None = None
    lora_alpha: int | None = None
    mixed_window: float = 0.0
    short_text: str = "documents"
    gradient_checkpointing: bool = True
    save_every: int = 50
    evaluate_every: int = 50
    seed: int = 0
    fsdp: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "save_every", "evaluate_every"):
            _require(_whole(getattr(self, name)) and getattr(self, name) >= 1, name, "a whole number from 1", self)
        _require(_whole(self.length) and self.length >= 4, "length", "a number of tokens, at least 4", self)
        _require(_whole(self.seed) and self.seed >= 0, "seed", "a whole number from 0", self)
        _require(_whole(self.warmup) and 0 <= self.warmup < self.steps, "warmup", f"in 0 .. {self.steps - 1}", self)
        _require(_finite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "a number above 0", self)
        for name in ("weight_decay", "max_grad_norm"):
            _require(_finite(getattr(self, name)) and getattr(self, name) >= 0, name, "a number from 0", self)
        _require(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self)
        _require(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}", self)
        _require(self.dtype in TUNING_DTYPES, "dtype", f"one of {', '.join(TUNING_DTYPES)}", self)
        _require(_finite(self.mixed_window) and 0 <= self.mixed_window < 1, "mixed_window", "a share in 0 .. 1", self)
        _require(self.short_text in SHORT_TEXTS, "short_text", f"one of {', '.join(SHORT_TEXTS)}", self)
        rank, alpha = self.lora_rank, self.lora_alpha
        _require(rank is None or (_whole(rank) and rank >= 1), "lora_rank", "None or a whole number from 1", self)
        _require(alpha is None or (_whole(alpha) and alpha >= 1), "lora_alpha", "None or a whole number from 1", self)
        _require(alpha is None or rank is not None, "lora_alpha", "None without lora_rank", self)
        _require(isinstance(self.gradient_checkpointing, bool), "gradient_checkpointing", "true or false", self)
        shards = self.fsdp is None or (isinstance(self.fsdp, Mapping) and _json(self.fsdp))
        _require(shards, "fsdp", "None or a table of plain values", self)
        if self.batch % self.micro_batch:
            raise LongRopeError(
                f"The batch must be a multiple of micro_batch, but they are {self.batch} and {self.micro_batch}."
            )

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a step, over all devices."""
        return self.batch // self.micro_batch

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` gives an equal object back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tuning:
        """The inverse of ``to_json``; a field that is left out takes its default.

        Raises
        ------
        LongRopeError
            An unknown field, a missing length or steps, or a value that makes no sense.
        """
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - names):
            raise LongRopeError(f"A tuning has no {', '.join(unknown)}; its fields are {', '.join(sorted(names))}.")
        if missing := sorted({"length", "steps"} - set(data)):
            raise LongRopeError(f"A tuning needs {' and '.join(missing)}.")
        return cls(**data)


def _require(holds: bool, name: str, wanted: str, tuning: Tuning) -> None:
    if not holds:
        raise LongRopeError(f"{name} of a tuning is {wanted}, not {getattr(tuning, name)!r}.")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json(value: object) -> bool:
    """Whether the store can keep it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _finite(value: object) -> bool:
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


# LongRoPE, section 4.1 and appendix A.2. RedPajama in chunks of the target length with BOS and EOS; the 256k stage goes
# on from the 128k one with the factors of 256k.
LLAMA2_128K = Tuning(length=131072, steps=400, learning_rate=2e-5, schedule="linear", warmup=20, batch=32)
LLAMA2_256K = Tuning(length=262144, steps=600, learning_rate=2e-5, schedule="linear", warmup=20, batch=32)
# Both targets on 16k sequences, as YaRN's Mistral: under the factors of 128k or of 256k.
MISTRAL = Tuning(length=16384, steps=400, learning_rate=1e-6, schedule="constant", warmup=0, batch=64)
