"""Free text on local data: summaries of long reports by ROUGE, and questions on several documents by their answers.

- Summaries, as Position Interpolation (arXiv 2306.15595, section 3.4) evaluates GovReport: the document, cut to the
  room, between its two sentences; ROUGE-1, 2 and L of what is generated greedily. JSONL lines with ``document`` and
  ``summary``.
- Questions on several documents, as Lost in the Middle (arXiv 2307.03172) asks them: right if one of the answers stands
  in what is generated, once case, punctuation, articles and white space are set aside. JSONL lines with ``question``,
  ``documents`` and ``answers``.

ROUGE is the package rouge-score, which comes with the extra ``evaluation``. Nothing is fetched.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from searcher.errors import LongRopeError, needs
from searcher.rope import Factors
from workers.frames import encode
from workers.generation import greedy
from workers.model import LoadedModel

SUMMARY_FRAME = "Read the following article and then summarize it.\n", "\nNow summarize the above article.\nSummary:"
QUESTION_FRAME = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n\n{documents}\n\nQuestion: {question}\nAnswer:"
)
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Report:
    """A document, and the summary that a person wrote of it."""

    document: str
    summary: str


@dataclass(frozen=True)
class Question:
    """A question, the documents it is asked on, in order, and the answers that count as right."""

    question: str
    documents: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class SummaryScore:
    """ROUGE over all reports.

    Attributes
    ----------
    rouge: rouge1, rouge2, rougeL -> mean F-measure of the stemmed texts, in per cent.
    cut: reports that were cut to the room.
    length, room: tokens of prompt and answer together, and of the answer, at most.
    """

    rouge: dict[str, float]
    reports: int
    cut: int
    length: int
    room: int


@dataclass(frozen=True)
class QuestionScore:
    """Right answers out of the questions that fit.

    Attributes
    ----------
    too_long: questions that were left out, since with their documents they take more than length - room tokens.
    """

    right: int
    asked: int
    too_long: int
    length: int
    room: int


def read_reports(path: Path) -> list[Report]:
    """Every line of a JSONL file with the texts ``document`` and ``summary``.

    Raises
    ------
    LongRopeError
        The file or a line of it is not that.
    """
    return [Report(_text(line, "document", at), _text(line, "summary", at)) for line, at in _lines(path)]


def read_questions(path: Path) -> list[Question]:
    """Every line of a JSONL file with the text ``question`` and the lists of texts ``documents`` and ``answers``.

    Raises
    ------
    LongRopeError
        The file or a line of it is not that.
    """
    return [
        Question(_text(line, "question", at), _texts(line, "documents", at), _texts(line, "answers", at))
        for line, at in _lines(path)
    ]


def score_summaries(
    loaded: LoadedModel, tokenizer: Any, reports: Sequence[Report], length: int, room: int, factors: Factors | None
) -> SummaryScore:
    """Summarise every report greedily in ``room`` tokens, prompt and answer in ``length``, and compare by ROUGE.

    Parameters
    ----------
    factors: the rotation; None for the model as it is, or for one in a block of ``sinks.attention_sinks``.

    Raises
    ------
    LongRopeError
        There are no reports, no room for any of their text, or rouge-score is not installed.
    """
    measure = _rouge()  # before anything is generated
    _some(reports, "reports")
    written, cut = [], 0
    for report in reports:
        tokens, whole = summary_prompt(tokenizer, report.document, length - room)
        cut += not whole
        written.append(_answer(loaded, tokenizer, tokens, room, factors))
    found = [measure.score(report.summary, text) for report, text in zip(reports, written, strict=True)]
    rouge = {name: 100 * fmean(each[name].fmeasure for each in found) for name in ROUGE}
    return SummaryScore(rouge, len(reports), cut, length, room)


def score_questions(
    loaded: LoadedModel, tokenizer: Any, questions: Sequence[Question], length: int, room: int, factors: Factors | None
) -> QuestionScore:
    """Answer every question greedily in ``room`` tokens, prompt and answer in ``length``.

    Parameters
    ----------
    factors: as for ``score_summaries``.

    Raises
    ------
    LongRopeError
        There are no questions, or none fits.
    """
    _some(questions, "questions")
    right = asked = 0
    for each in questions:
        tokens = question_prompt(tokenizer, each)
        if len(tokens) <= length - room:
            asked += 1
            right += holds_answer(_answer(loaded, tokenizer, tokens, room, factors), each.answers)
    if not asked:
        raise LongRopeError(
            f"None of {len(questions)} questions fits, with its documents, into {length} tokens with {room} left for "
            "the answer; take a longer length, or fewer documents a question."
        )
    return QuestionScore(right, asked, len(questions) - asked, length, room)


def summary_prompt(tokenizer: Any, document: str, most: int) -> tuple[list[int], bool]:
    """The prompt in at most ``most`` tokens, BOS first where there is one; and whether the whole document is in it."""
    before, behind = (encode(tokenizer, part) for part in SUMMARY_FRAME)
    before = _opening(tokenizer) + before
    body = encode(tokenizer, document)
    budget = most - len(before) - len(behind)
    if budget < 1:
        raise LongRopeError(
            f"The question for a summary takes {len(before) + len(behind)} tokens, but {most} are left beside the "
            "answer; take a longer length or less room for the answer."
        )
    return before + body[:budget] + behind, len(body) <= budget


def question_prompt(tokenizer: Any, question: Question) -> list[int]:
    """The prompt in tokens, BOS first where there is one."""
    documents = "\n".join(f"Document [{i}] {text}" for i, text in enumerate(question.documents, start=1))
    text = QUESTION_FRAME.format(documents=documents, question=question.question)
    return _opening(tokenizer) + encode(tokenizer, text)


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text; case, punctuation, articles and white space aside."""
    plain = f" {_plain(text)} "
    return any(f" {_plain(answer)} " in plain for answer in answers)


def _plain(text: str) -> str:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _rouge() -> Any:
    with needs("A comparison of summaries", "rouge-score", "evaluation"):
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(ROUGE, use_stemmer=True)


def _answer(loaded: LoadedModel, tokenizer: Any, tokens: list[int], room: int, factors: Factors | None) -> str:
    return str(tokenizer.decode(greedy(loaded, tokens, room, factors), skip_special_tokens=True))


def _opening(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _some(items: Sequence[object], what: str) -> None:
    if not items:
        raise LongRopeError(f"There are no {what} to score; name a JSONL file that holds some.")


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every line that is not blank, as an object, and where it stands."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LongRopeError(f"{path} cannot be read as text: {error}.") from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        at = f"Line {number} of {path}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise LongRopeError(f"{at} is not JSON: {error}.") from error
        if not isinstance(line, dict):
            raise LongRopeError(f"{at} must hold a JSON object.")
        yield line, at


def _text(line: dict[str, Any], name: str, at: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value.strip():
        raise LongRopeError(f"{at} must have the text {name!r}.")
    return value


def _texts(line: dict[str, Any], name: str, at: str) -> tuple[str, ...]:
    value = line.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each.strip() for each in value):
        raise LongRopeError(f"{at} must have the list of texts {name!r}.")
    return tuple(value)
