"""The sentences of retrieval prompts: passkey, key-value lines and objects, planted needles.

A literal frame holds the published sentences, a compact one those that the reference model was trained on: shorter, so
that a small window holds a task.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from searcher.errors import LongRopeError

PASSKEY, KEY_VALUE, JSON, TITLE = "passkey", "key_value", "key_value_json", "title"
LITERAL, COMPACT = "literal", "compact"


@dataclass(frozen=True)
class NeedleFrame:
    """How a needle and its question read.

    Attributes
    ----------
    needle, question: with ``{key}`` and ``{value}``; the value is the last of what is asked for.
    digits: of a value.
    """

    needle: str
    question: str
    digits: int


COMPACT_NEEDLE = NeedleFrame("\n'{key}' = '{value}'\n", "\nWhat is '{key}'? '{key}' = '{value}'", 4)
# The sentences of the passkey task (Mohtashami & Jaggi, arXiv 2305.16300), a key beside each so that there can be many.
LITERAL_NEEDLE = NeedleFrame(
    "\nThe pass key of {key} is {value}. Remember it. {value} is the pass key of {key}.\n",
    "\nWhat is the pass key of {key}? The pass key of {key} is {value}.",
    5,
)


@dataclass(frozen=True)
class PasskeyFrame:
    """The sentences of a passkey prompt: opening, filler, needle, filler, question, each on a line of its own.

    ``filler`` is repeated and cut; ``question`` ends with the answer, whose last character is not part of the value.
    """

    opening: str
    filler: str
    needle: str
    question: str


@dataclass(frozen=True)
class PairsFrame:
    """The sentences of a key-value prompt: opening, pairs with ``between`` between them, question with its answer.

    ``key`` and ``value`` make one each from a generator.
    """

    opening: str
    pair: str
    between: str
    question: str
    key: Callable[[random.Random], str]
    value: Callable[[random.Random], str]


def _hexadecimal(digits: int) -> Callable[[random.Random], str]:
    return lambda rng: f"{rng.getrandbits(4 * digits):0{digits}x}"


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_PASSKEY_SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "The pass key is {value}. Remember it. {value} is the pass key.",
    "What is the pass key? The pass key is {value}.",
)
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize {it}. "
    "I will quiz you about the important information there."
)
_JSON_PAIR = '"{key}": "{value}"'

HEX, DIGITS = "0123456789abcdef", "0123456789"

# The literal frame holds the published sentences; the compact one what the reference model was trained on.
PASSKEY_FRAMES = {
    LITERAL: PasskeyFrame(_TASK.format(it="them"), _PASSKEY_SENTENCES[0] + " ", *_PASSKEY_SENTENCES[1:]),
    COMPACT: PasskeyFrame(_TASK.format(it="it"), _PASSKEY_SENTENCES[0] + "\n", *_PASSKEY_SENTENCES[1:]),
}
# Where a published question does not begin its answer, the pair's own form up to the value does, so that a model
# without instruction tuning can be asked and the answer is fixed.
PAIRS_FRAMES = {
    (KEY_VALUE, LITERAL): PairsFrame(
        opening="## UUID key/value pairs to remember:\n\n",
        pair=COMPACT_NEEDLE.needle.strip("\n"),
        between="\n",
        question="\n\n\n What is the value of the key '{key}'?\n'{key}' = '{value}'",
        key=_hexadecimal(8),
        value=_hexadecimal(4),
    ),
    (KEY_VALUE, COMPACT): PairsFrame(
        opening="",
        pair=COMPACT_NEEDLE.needle.strip("\n"),
        between="\n",
        question=COMPACT_NEEDLE.question,
        key=_hexadecimal(4),
        value=_hexadecimal(4),
    ),
    (JSON, LITERAL): PairsFrame(
        opening="Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{",
        pair=_JSON_PAIR,
        between=",\n ",
        question='}}\n\nKey: "{key}"\nCorresponding value: "{value}"',
        key=_uuid,
        value=_uuid,
    ),
    (JSON, COMPACT): PairsFrame(
        opening="{ ",
        pair=_JSON_PAIR,
        between=",\n ",
        question=f'}}}}\nWhat is "{{key}}"? {_JSON_PAIR}',
        key=_hexadecimal(4),
        value=_hexadecimal(4),
    ),
}


def answer_place(tokenizer: Any, question: str, value: str) -> tuple[int, int]:
    """How many tokens at a question's end hang on its value, and how many come after those.

    They are found by other values, different in every digit: whatever the tokenizer merges, no token that says anything
    about the value is the same there.
    """
    head, tail = question[: question.rindex(value)], question[question.rindex(value) + len(value) :]
    tokens, others = (
        encode(tokenizer, question),
        [encode(tokenizer, head + other + tail) for other in others_than(value)],
    )
    first = max(common(tokens, other) for other in others)
    after = max(common(tokens[::-1], other[::-1]) for other in others)
    if first + after >= len(tokens):
        raise LongRopeError("Retrieval needs a tokenizer that tells digits apart; this one does not.")
    return len(tokens) - first - after, after


def others_than(value: str) -> list[str]:
    """Values as long as this one that differ in every digit."""
    alphabet = DIGITS if set(value) <= set(DIGITS) else HEX
    places = [alphabet.find(digit) for digit in value]  # -1: the hyphens of a UUID
    return [
        "".join(
            digit if at < 0 else alphabet[(at + shift) % len(alphabet)] for digit, at in zip(value, places, strict=True)
        )
        for shift in range(1, len(alphabet))
    ]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without special ones."""
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
