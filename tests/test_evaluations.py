"""``longrope evaluate`` beyond perplexity: sliding windows, positions, sinks, retrieval, free text; and its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from storage.measured import read_evaluation
from tests.conftest import Longrope

LENGTHS = "--lengths=64,512"


@pytest.fixture(scope="module")
def found(tiny_llama_folder: Path, text_folder: Path, longrope_in: Longrope, tmp_path_factory: Any) -> dict[str, Any]:
    """Everything that needs no extra, measured once on one document."""
    ended = longrope_in(
        tmp_path_factory.mktemp("evaluate"),
        *("evaluate", "--in-process", f"--model={tiny_llama_folder}", f"--data={text_folder / '3.txt'}", "--json"),
        *(LENGTHS, "--measure=perplexity,sliding,passkey,key_value,key_value_json", "--windows=1", "--stride=63"),
    )
    assert (ended.status, ended.err) == (0, "")
    answer: dict[str, Any] = json.loads(ended.out)
    return answer


def test_the_first_sliding_window_is_the_single_one_and_the_rest_adds_its_stride(found: dict[str, Any]) -> None:
    rows = [row for row in found["sliding"] if row["length"] == 512]
    assert {row["attention"] for row in rows} == {"own", "su"}
    for row in rows:
        assert row["single"]["tokens"] == 511
        assert row["sliding"]["tokens"] == 511 + 189  # four windows: every token of the document, once
        assert sum(bucket["tokens"] for bucket in row["positions"]) == 511
        total = math.fsum(bucket["nll"] for bucket in row["positions"])
        assert total == pytest.approx(row["single"]["nll"], rel=1e-9)


def test_all_ways_agree_on_a_single_window(found: dict[str, Any]) -> None:
    for row in found["sliding"]:
        if row["attention"] == "own" and row["method"] in found["perplexity"]:
            expected = found["perplexity"][row["method"]][str(row["length"])]
            assert row["single"]["perplexity"] == pytest.approx(expected, rel=1e-9)
    assert {row["method"] for row in found["sliding"]} == {*found["perplexity"], "attention_sinks"}


def test_retrieval_counts_its_trials_and_leaves_out_what_does_not_fit(found: dict[str, Any]) -> None:
    for kind, trials in (("passkey", 20), ("key_value", 21), ("key_value_json", 20)):
        assert found[kind].keys() == found["perplexity"].keys()
        for cells in found[kind].values():
            for cell in (cell for cell in cells.values() if cell["by_depth"]):
                depths = [row for row in cell["by_depth"] if row["depth"] is not None]
                (whole,) = [row for row in cell["by_depth"] if row["depth"] is None]
                assert sum(row["trials"] for row in depths) == whole["trials"] == trials
                assert whole["low"] <= whole["accuracy"] <= whole["high"]
                assert 0 < whole["chance"] <= 1
    assert found["passkey"]["none"]["64"]["by_depth"] == []  # no passkey prompt is so short
    assert found["passkey_with_sinks"].keys() == {"512"}


def test_the_tables_show_what_was_measured(
    tiny_llama_folder: Path, text_folder: Path, longrope: Longrope, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    row = {"question": "which", "documents": ["abc", "def"], "answers": ["xyz"]}
    questions.write_text(json.dumps(row) + "\n")
    ended = longrope(
        *("evaluate", "--in-process", f"--model={tiny_llama_folder}", f"--data={text_folder / '3.txt'}"),
        *("--lengths=512", "--measure=sliding,key_value", "--windows=1", f"--questions={questions}"),
    )
    assert ended.status == 0, ended.err
    for title in (
        "Perplexity, single windows, each method under its own attention factor",
        "Perplexity, sliding windows, stride 64, each method under attention factor su",
        "Perplexity by position in windows of 512 tokens",
        "Key-value retrieval: right of all trials",
        "Questions answered",
    ):
        assert title in " ".join(ended.out.split())  # a narrow table folds its title
    assert "0/1" in ended.out.split("Questions answered")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measure=perplexity,flavour"], "What can be measured is perplexity, sliding"),
        (["--measure=sliding", "--stride=512"], "The stride of a window of 512 tokens"),
        (["--measure=sliding", "--sinks=64"], "sinks"),
        (["--measure=sliding", "--attention-factor=big"], "attention factor is one of su"),
        (["--questions=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    tiny_llama_folder: Path, text_folder: Path, longrope: Longrope, options: list[str], message: str
) -> None:
    ended = longrope(
        *("evaluate", "--in-process", f"--model={tiny_llama_folder}", f"--data={text_folder}", "--lengths=512"),
        *options,
    )
    assert ended.status == 1
    assert ended.err.count("\n") == 1
    assert message in ended.err


def test_a_report_reads_what_the_command_prints(found: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(found))
    measured = read_evaluation(path)
    own = [row for row in found["sliding"] if row["attention"] == "own" and row["failure"] is None]
    for row in own:
        method, length = row["method"], row["length"]
        assert measured.perplexity[method][length] == row["single"]["perplexity"]
        assert measured.sliding[method][length] == row["sliding"]["perplexity"]
        buckets = measured.positions[method][length]
        assert [(bucket.start, bucket.end) for bucket in buckets] == [(b["start"], b["end"]) for b in row["positions"]]
        total = math.fsum(
            math.log(b.perplexity) * each["tokens"] for b, each in zip(buckets, row["positions"], strict=True)
        )
        assert total == pytest.approx(row["single"]["nll"], rel=1e-9)
    assert sum(map(len, measured.positions.values())) == len(own)
    for kind in ("passkey", "key_value", "key_value_json"):
        for method, cells in found[kind].items():
            for length, cell in cells.items():
                trials = measured.retrieval[kind].get(method, {}).get(int(length), [])
                assert sum(each.right for each in trials) == sum(
                    row["right"] for row in cell["by_depth"] if row["depth"] is not None
                )
