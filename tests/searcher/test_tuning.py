"""A fine-tuning stage as data: what it takes, what it refuses, and the paper's own settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from searcher.errors import LongRopeError
from searcher.tuning import LLAMA2_128K, LLAMA2_256K, MISTRAL, OPTIMIZERS, SCHEDULES, Tuning

EVERYTHING = Tuning(
    length=512,
    steps=30,
    learning_rate=1e-4,
    schedule="cosine",
    warmup=5,
    batch=8,
    micro_batch=2,
    weight_decay=0.1,
    max_grad_norm=0.5,
    optimizer="adafactor",
    dtype="float32",
    lora_rank=8,
    lora_alpha=32,
    mixed_window=0.25,
    short_text="windows",
    gradient_checkpointing=False,
    save_every=7,
    evaluate_every=9,
    seed=3,
    fsdp={"reshard_after_forward": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
)


@pytest.mark.parametrize("tuning", [EVERYTHING, Tuning(length=64, steps=21), LLAMA2_128K, LLAMA2_256K, MISTRAL])
def test_a_tuning_comes_back_from_json_as_it_was(tuning: Tuning) -> None:
    assert Tuning.from_json(json.loads(json.dumps(tuning.to_json()))) == tuning


def test_no_field_of_the_round_trip_has_its_default() -> None:
    """Else the test above would not see that one got lost."""
    plain = Tuning(length=64, steps=21).to_json()
    assert [name for name, value in EVERYTHING.to_json().items() if value == plain[name]] == []


def test_what_is_left_out_takes_the_papers_values() -> None:
    tuning = Tuning.from_json({"length": 131072, "steps": 400})
    assert tuning == LLAMA2_128K
    assert (tuning.learning_rate, tuning.schedule, tuning.warmup, tuning.batch) == (2e-5, "linear", 20, 32)
    assert (LLAMA2_256K.length, LLAMA2_256K.steps) == (262144, 600)
    assert (MISTRAL.length, MISTRAL.steps, MISTRAL.batch) == (16384, 400, 64)
    assert (MISTRAL.learning_rate, MISTRAL.schedule) == (1e-6, "constant")


def test_micro_steps_fill_the_batch() -> None:
    assert EVERYTHING.micro_steps == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 3}, "length"),
        ({"length": 64.0}, "length"),
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 20}, "warmup"),
        ({"warmup": -1}, "warmup"),
        ({"batch": 0}, "batch"),
        ({"batch": 6, "micro_batch": 4}, "multiple"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "2e-5"}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "step"}, ", ".join(SCHEDULES)),
        ({"optimizer": "adam"}, ", ".join(OPTIMIZERS)),
        ({"dtype": "float16"}, "bfloat16"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_alpha": 16}, "lora_rank"),
        ({"mixed_window": 1.0}, "mixed_window"),
        ({"short_text": "sentences"}, "documents, windows"),
        ({"save_every": 0}, "save_every"),
        ({"seed": -1}, "seed"),
        ({"fsdp": "full_shard"}, "fsdp"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(LongRopeError, match=said):
        Tuning.from_json({"length": 64, "steps": 100, **change})


def test_fields_that_are_not_known_or_missing_are_named() -> None:
    with pytest.raises(LongRopeError, match="no rate"):
        Tuning.from_json({"length": 64, "steps": 100, "rate": 1})
    with pytest.raises(LongRopeError, match="needs length and steps"):
        Tuning.from_json({})
