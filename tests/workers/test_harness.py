"""lm-evaluation-harness scores the rotated model, on a task whose answers are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searcher.errors import LongRopeError
from searcher.rope import Factors
from workers.harness import harness_results
from workers.model import LoadedModel, load_tokenizer
from workers.perplexity import negative_log_likelihood

FACTORS = Factors((3.0,) * 8, attention_factor=1.2)
CHOICES = ("red", "blue", "a long green")


def test_a_library_that_is_not_installed_is_named(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LongRopeError, match=r"longrope-search\[evaluation\]"):
        harness_results(llama, None, ["arc_easy"], 64, None)


def test_streamed_layers_are_refused(llama: LoadedModel) -> None:
    with pytest.raises(LongRopeError, match="without stream_weights"):
        harness_results(replace(llama, stream_weights=True), None, ["arc_easy"], 64, None)


@pytest.mark.slow
def test_choices_are_ranked_by_their_loss_under_the_factors(
    llama: LoadedModel, llama_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    tokenizer = load_tokenizer(llama_folder)
    prompts = [f"Sky number {i} over the sea is" for i in range(8)]
    before = llama.model.model.rotary_emb

    def loss(prompt: str, choice: str, factors: Factors | None) -> float:
        prefix, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, " " + choice))
        tokens = np.array([*prefix, *answer], np.uint32)
        return negative_log_likelihood(llama, tokens, factors, [(len(prefix), len(tokens))])[0]

    best = [int(np.argmin([loss(prompt, choice, FACTORS) for choice in CHOICES])) for prompt in prompts]
    plain = [int(np.argmin([loss(prompt, choice, None) for choice in CHOICES])) for prompt in prompts]
    rows = [{"prompt": p, "choices": list(CHOICES), "best": b} for p, b in zip(prompts, best, strict=True)]
    data = tmp_path / "task.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    task: dict[str, Any] = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{best}}",
        "metric_list": [{"metric": "acc"}],
    }
    rotated = harness_results(llama, tokenizer, [task], 128, FACTORS)
    assert rotated["results"]["local"]["acc,none"] == 1.0
    untouched = harness_results(llama, tokenizer, [task], 128, None)
    assert untouched["results"]["local"]["acc,none"] == np.mean([a == b for a, b in zip(best, plain, strict=True)])
    assert llama.model.model.rotary_emb is before
