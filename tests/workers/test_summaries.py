"""Summaries and answers on local data: what the model is asked, what it writes, and how that is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from searcher.errors import LongRopeError
from searcher.rope import Factors
from tests.tiny_models import write_model
from workers.model import LoadedModel, ModelRequest, load_model
from workers.sinks import Sinks, attention_sinks
from workers.summaries import (
    Question,
    Report,
    holds_answer,
    question_prompt,
    read_questions,
    read_reports,
    score_questions,
    score_summaries,
    summary_prompt,
)

LENGTH, ROOM = 320, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, AutoTokenizer]:
    folder = write_model(tmp_path_factory.mktemp("summaries") / "llama", "llama")
    return load_model(ModelRequest(str(folder), 1024)), AutoTokenizer.from_pretrained(folder)


def written(loaded: LoadedModel, tokenizer: AutoTokenizer, tokens: list[int], factors: Factors) -> str:
    """Greedy, token by token, without a cache."""
    ids = list(tokens)
    with loaded.under(factors), torch.no_grad():
        for _ in range(ROOM):
            ids.append(int(loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    return str(tokenizer.decode(ids[len(tokens) :], skip_special_tokens=True))  # type: ignore[attr-defined]


def test_the_prompt_is_the_document_between_two_sentences(model: tuple[LoadedModel, AutoTokenizer]) -> None:
    _, tokenizer = model
    tokens, whole = summary_prompt(tokenizer, "Water was cold.", 1000)
    assert whole
    assert tokens[0] == 0
    text = tokenizer.decode(tokens[1:])  # type: ignore[attr-defined]
    assert text == (
        "Read the following article and then summarize it.\nWater was cold.\nNow summarize the above article.\nSummary:"
    )
    least = len(tokens) - len("Water was cold.")
    cut, whole = summary_prompt(tokenizer, "Water was cold.", least + 5)
    assert (len(cut), whole) == (least + 5, False)
    assert "it.\nWater\nNow" in tokenizer.decode(cut)  # type: ignore[attr-defined]
    with pytest.raises(LongRopeError, match=f"takes {least} tokens, but {least} are left"):
        summary_prompt(tokenizer, "Water was cold.", least)


def test_documents_are_numbered_in_their_order(model: tuple[LoadedModel, AutoTokenizer]) -> None:
    _, tokenizer = model
    tokens = question_prompt(tokenizer, Question("Who?", ("Ann {went}.", "Bob came."), ("Ann",)))
    text = tokenizer.decode(tokens[1:])  # type: ignore[attr-defined]
    assert text.endswith("\n\nDocument [1] Ann {went}.\nDocument [2] Bob came.\n\nQuestion: Who?\nAnswer:")
    assert tokens[0] == 0


def test_an_answer_is_right_where_greedy_decoding_writes_it(model: tuple[LoadedModel, AutoTokenizer]) -> None:
    loaded, tokenizer = model
    factors = Factors((3.0,) * 8, attention_factor=1.1)
    asked = [Question(f"Number {i}?", ("One text.", f"Another {i}."), ("x",)) for i in range(4)]
    texts = [written(loaded, tokenizer, question_prompt(tokenizer, each), factors) for each in asked]
    # For two of them what the model writes is made the answer.
    known = [Question(q.question, q.documents, ("no such", texts[i])) if i % 2 else q for i, q in enumerate(asked)]
    expected = [holds_answer(text, q.answers) for text, q in zip(texts, known, strict=True)]
    assert expected[1]
    assert expected[3]
    too_long = Question("Which?", ("x" * LENGTH,), ("x",))
    found = score_questions(loaded, tokenizer, [*known, too_long], LENGTH, ROOM, factors)
    assert (found.right, found.asked, found.too_long) == (sum(expected), 4, 1)
    assert (found.length, found.room) == (LENGTH, ROOM)
    # The rotation matters: under another the model writes something else.
    other = score_questions(loaded, tokenizer, known, LENGTH, ROOM, Factors((1.0,) * 8))
    assert other.right < found.right


def test_answers_are_written_under_attention_sinks_too(model: tuple[LoadedModel, AutoTokenizer]) -> None:
    loaded, tokenizer = model
    asked = [Question("Who?", ("Ann went. " * 8,), ("x",))]
    with attention_sinks(loaded, Sinks(64)):
        assert score_questions(loaded, tokenizer, asked, LENGTH, ROOM, None).asked == 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It was the Big Apple, of course.", True),
        ("BIG   APPLE", True),
        ("a big, apple!", True),
        ("bigapple", False),
        ("big apples", False),
        ("", False),
    ],
)
def test_an_answer_counts_as_whole_words(text: str, right: bool) -> None:
    assert holds_answer(text, ["Pear", "The Big Apple"]) is right


def test_questions_that_do_not_fit_are_refused(model: tuple[LoadedModel, AutoTokenizer]) -> None:
    loaded, tokenizer = model
    with pytest.raises(LongRopeError, match=r"None of 1 questions fits"):
        score_questions(loaded, tokenizer, [Question("Who?", ("x" * LENGTH,), ("x",))], LENGTH, ROOM, None)
    with pytest.raises(LongRopeError, match="no questions to score"):
        score_questions(loaded, tokenizer, [], LENGTH, ROOM, None)


def test_lines_become_reports_and_questions(tmp_path: Path) -> None:
    reports, questions = tmp_path / "reports.jsonl", tmp_path / "questions.jsonl"
    reports.write_text(json.dumps({"document": "Long.", "summary": "Short.", "id": 3}) + "\n\n", encoding="utf-8")
    assert read_reports(reports) == [Report("Long.", "Short.")]
    line = {"question": "Who?", "documents": ["Ann.", "Bob."], "answers": ["Ann"]}
    questions.write_text(json.dumps(line) + "\n" + json.dumps(line), encoding="utf-8")
    assert read_questions(questions) == [Question("Who?", ("Ann.", "Bob."), ("Ann",))] * 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"document": "x"', "Line 1 of .* is not JSON"),
        ('\n["x"]', "Line 2 of .* must hold a JSON object"),
        ('{"document": "x"}', "must have the text 'summary'"),
        ('{"document": "x", "summary": " "}', "must have the text 'summary'"),
        ('{"document": 3, "summary": "x"}', "must have the text 'document'"),
    ],
)
def test_lines_that_are_none_are_named(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(LongRopeError, match=said):
        read_reports(path)
    with pytest.raises(LongRopeError, match=r"cannot be read as text"):
        read_reports(tmp_path / "none.jsonl")


@pytest.mark.parametrize("answers", ["x", [], [3], [""], None])
def test_answers_must_be_a_list_of_texts(answers: object, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "Who?", "documents": ["x"], "answers": answers}), encoding="utf-8")
    with pytest.raises(LongRopeError, match="must have the list of texts 'answers'"):
        read_questions(path)


def test_rouge_that_is_not_installed_is_named_before_anything_is_generated(
    model: tuple[LoadedModel, AutoTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr("workers.summaries.greedy", None)
    with pytest.raises(LongRopeError, match=r"longrope-search\[evaluation\]"):
        score_summaries(*model, [Report("Long.", "Short.")], LENGTH, ROOM, None)


def test_summaries_are_compared_by_rouge(model: tuple[LoadedModel, AutoTokenizer]) -> None:
    pytest.importorskip("rouge_score")
    loaded, tokenizer = model
    factors = Factors((3.0,) * 8)
    text = written(loaded, tokenizer, summary_prompt(tokenizer, "Cold water. " * 30, LENGTH - ROOM)[0], factors)
    reports = [Report("Cold water. " * 30, f"{text} word"), Report("Rain.", "nothing alike")]
    found = score_summaries(loaded, tokenizer, reports, LENGTH, ROOM, factors)
    assert (found.reports, found.cut, found.length, found.room) == (2, 1, LENGTH, ROOM)
    assert set(found.rouge) == {"rouge1", "rouge2", "rougeL"}


def test_rouge_is_the_mean_f_measure_in_per_cent(
    model: tuple[LoadedModel, AutoTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 3 of 4 words, 1 of 3 pairs of words, 3 words in order; and a text that is its own summary."""
    pytest.importorskip("rouge_score")
    texts = iter(["dogs chased red cars", "one two three"])
    monkeypatch.setattr("workers.summaries._answer", lambda *_: next(texts))
    reports = [Report("x", "dog chase blue car"), Report("y", "one two three")]
    found = score_summaries(*model, reports, LENGTH, ROOM, None)
    assert found.rouge == pytest.approx({"rouge1": 87.5, "rouge2": 100 * (1 / 3 + 1) / 2, "rougeL": 87.5})
