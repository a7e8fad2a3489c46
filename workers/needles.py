"""Needles planted in a window, so that only what the whole window decides is scored (LongRoPE2, arXiv 2502.20082).

Most tokens of a text follow from the few before them, whatever the rotation. The value of a needle does not: it can
only be read where the needle stands, up to a whole window away. A planted window holds needles at spread depths and
at its end a question about each, and ``Document.spans`` names the tokens that the answers consist of.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from searcher.errors import LongRopeError
from workers.dataset import ON_DISK, Window

COMPACT_BELOW = 8192  # tokens of a window: shorter ones get the compact frame, which small models learn
TOKENS_A_NEEDLE = 128  # by default one needle for so many tokens of a window
MOST_BY_DEFAULT = 16


@dataclass(frozen=True)
class Frame:
    """How a needle and its question read.

    Attributes
    ----------
    needle, question: with ``{key}`` and ``{value}``; the value is the last of what is asked for.
    digits: of a value.
    """

    needle: str
    question: str
    digits: int


COMPACT = Frame("\n'{key}' = '{value}'\n", "\nWhat is '{key}'? '{key}' = '{value}'", 4)
# The sentences of the passkey task (Mohtashami & Jaggi, arXiv 2305.16300), a key beside each so that there can be many.
LITERAL = Frame(
    "\nThe pass key of {key} is {value}. Remember it. {value} is the pass key of {key}.\n",
    "\nWhat is the pass key of {key}? The pass key of {key} is {value}.",
    5,
)


def plant(window: Window, tokenizer: Any, seed: int, count: int | None = None) -> Window:
    """The window with needles in it and questions at its end; as long as before, and the same text between them.

    Needles take the place of the tokens they stand on. Each stands somewhere in its share of the text before the
    questions; the order of the questions is drawn. Keys are four hexadecimal digits, values digits. All of it depends
    on the seed and the window's tokens alone.

    Parameters
    ----------
    window: plain text, BOS first where the tokenizer has one.
    seed: non-negative.
    count: needles; None for one in 128 tokens, at most 16, at least one.

    Returns
    -------
    Window
        ``document.spans`` are the answers: the tokens of each question that hang on its value. So count spans.

    Raises
    ------
    LongRopeError
        The window is too short for so many needles, or the tokenizer does not tell digits apart.
    """
    length = len(window.tokens)
    wanted = count if count is not None else min(max(length // TOKENS_A_NEEDLE, 1), MOST_BY_DEFAULT)
    if wanted < 1:
        raise LongRopeError(f"At least 1 needle can be planted in a window, not {wanted}.")
    rng = random.Random(f"{seed} {window.document.sha256}")
    frame = COMPACT if length < COMPACT_BELOW else LITERAL
    keys = [f"{key:04x}" for key in rng.sample(range(16**4), wanted)]
    values = [f"{value:0{frame.digits}}" for value in rng.sample(range(10**frame.digits), wanted)]

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])

    needles = [encode(frame.needle.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    order = rng.sample(range(wanted), wanted)
    questions = [_question(frame.question, keys[i], values[i], encode) for i in order]

    start = 0 if tokenizer.bos_token_id is None else 1
    end = length - sum(len(question) for question, _, _ in questions)
    share = (end - start) // wanted
    longest = max(map(len, needles))
    if share < longest:
        raise LongRopeError(
            f"A window of {length} tokens has no room for needles and questions, {wanted} of each; plant fewer, or "
            "give a longer --target."
        )
    tokens = np.array(window.tokens)
    for i, needle in enumerate(needles):
        place = start + i * share + rng.randrange(share - len(needle) + 1)
        tokens[place : place + len(needle)] = needle
    spans, place = [], end
    for question, first, last in questions:
        tokens[place : place + len(question)] = question
        spans.append((place + first, place + last))
        place += len(question)
    tokens.setflags(write=False)
    digest = hashlib.sha256(tokens.astype(ON_DISK, copy=False).data).hexdigest()
    name = f"{window.document.name}+{wanted}needles"
    return replace(
        window, document=replace(window.document, name=name, sha256=digest, spans=tuple(spans)), tokens=tokens
    )


def _question(template: str, key: str, value: str, encode: Callable[[str], list[int]]) -> tuple[list[int], int, int]:
    """A question's tokens, and where those that hang on its value begin and end.

    They are found by asking for other values, different in every digit: whatever the tokenizer merges, no token that
    says anything about the value is the same there.
    """

    def asked(shift: int) -> list[int]:
        shifted = "".join(str((int(digit) + shift) % 10) for digit in value)
        return encode(template.format(key=key, value=shifted))

    tokens, others = asked(0), [asked(shift) for shift in range(1, 10)]
    first = max(_common(tokens, other) for other in others)
    last = len(tokens) - max(_common(tokens[::-1], other[::-1]) for other in others)
    if first >= last:
        raise LongRopeError("Needles need a tokenizer that tells digits apart; score plain text instead.")
    return tokens, first, last


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
