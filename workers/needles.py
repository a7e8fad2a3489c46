"""Needles planted in a window, so that only what the whole window decides is scored (LongRoPE2, arXiv 2502.20082).

Most tokens of a text follow from the few before them, whatever the rotation. The value of a needle does not: it can
only be read where the needle stands, up to a whole window away. A planted window holds needles at spread depths and
at its end a question about each, and ``Document.spans`` names the tokens that the answers consist of.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import numpy as np

from searcher.errors import LongRopeError
from workers.dataset import ON_DISK, Window
from workers.frames import COMPACT_NEEDLE, LITERAL_NEEDLE, answer_place, encode

COMPACT_BELOW = 8192  # tokens of a window: shorter ones get the compact frame, which small models learn
TOKENS_A_NEEDLE = 128  # by default one needle for so many tokens of a window
MOST_BY_DEFAULT = 16


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
    frame = COMPACT_NEEDLE if length < COMPACT_BELOW else LITERAL_NEEDLE
    keys = [f"{key:04x}" for key in rng.sample(range(16**4), wanted)]
    values = [f"{value:0{frame.digits}}" for value in rng.sample(range(10**frame.digits), wanted)]

    needles = [encode(tokenizer, frame.needle.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    order = rng.sample(range(wanted), wanted)
    questions = []
    for i in order:
        asked = frame.question.format(key=keys[i], value=values[i])
        size, after = answer_place(tokenizer, asked, values[i])
        tokens_asked = encode(tokenizer, asked)
        last = len(tokens_asked) - after
        questions.append((tokens_asked, last - size, last))

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
