"""Passkey and key-value retrieval: one thing said once in a long prompt, asked for at its end, judged by exact match.

- Passkey, as Mohtashami & Jaggi (arXiv 2305.16300) and Position Interpolation (arXiv 2306.15595, section 3.3) use it.
  The prompt with BOS and the answer is exactly as many tokens as stated; the filler is trimmed to that.
- Key-value, in the form of h2oGPT's long-context test: lines of 'key' = 'value', the question at the end.
- Key-value as a JSON object with the answer's position swept (Lost in the Middle, arXiv 2307.03172, figure 6).

Key-value prompts hold as many pairs as fit beside the room for the answer, so they end up to one pair short.

An answer is right if greedy decoding gives it. Each greedy token is the arg max given the right tokens so far, as long
as those were right; so one forward over prompt and answer decides: the arg max must be right at every token of it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.study import Document
from workers.dataset import ON_DISK, TokenArray
from workers.frames import (
    COMPACT,
    JSON,
    KEY_VALUE,
    LITERAL,
    PAIRS_FRAMES,
    PASSKEY,
    PASSKEY_FRAMES,
    answer_place,
    common,
    encode,
    others_than,
)
from workers.model import LoadedModel
from workers.perplexity import wrong_tokens

LITERAL_FROM = 2048  # tokens of a model's own window: from there on the published sentences and answer room
ANSWER_ROOM = 256  # tokens; below LITERAL_FROM an eighth of the window, which is as much at the border

# Where in the prompt the answer stands, as a share of the filler or of the pairs before it; and trials at each.
DEPTHS = {PASSKEY: (0.0, 0.25, 0.5, 0.75, 1.0), KEY_VALUE: (0.2, 0.5, 0.8), JSON: (0.0, 0.25, 0.5, 0.75, 1.0)}
TRIALS = {PASSKEY: 4, KEY_VALUE: 7, JSON: 4}
PAPER_DEPTHS = tuple(i / 31 for i in range(32))  # Position Interpolation: 32 distances, evenly spaced,
PAPER_TRIALS = 10  # and 10 trials at each

TRIED = 8  # characters more or less of the filler, where it is cut to make an exact number of tokens


@dataclass(frozen=True)
class Task:
    """What one trial asks; with a tokenizer it decides the trial to the last token.

    Attributes
    ----------
    kind: PASSKEY, KEY_VALUE, JSON or TITLE.
    frame: LITERAL or COMPACT.
    length: tokens of the whole prompt, BOS and answer (or the room for it) included.
    room: tokens left for the answer; 0 where the answer itself fills the length (PASSKEY).
    depth: share of the filler, or of the other pairs, that stands before the answer.
    number: which of the trials at this depth.
    seed: non-negative.
    """

    kind: str
    frame: str
    length: int
    room: int
    depth: float
    number: int
    seed: int


@dataclass(frozen=True, eq=False)
class Trial:
    """A prompt with its answer, in tokens.

    Attributes
    ----------
    tokens: uint32, (n,), BOS first where there is one, the answer last; read-only. n is the task's length, or up to the
        room and one pair less.
    answer: half-open range of positions that the answer's tokens stand at; it ends at n.
    expected: the answer as text.
    distance: tokens from the first one that hangs on the answer, where it is said first, to the end of the question.
    chance: of a guess among the values that the prompt could hold (PASSKEY) or holds (the others).
    """

    task: Task
    tokens: TokenArray
    answer: tuple[int, int]
    expected: str
    distance: int
    chance: float

    @property
    def sha256(self) -> str:
        """Of the tokens as little-endian uint32; with the answer's range it says what was asked."""
        return hashlib.sha256(self.tokens.astype(ON_DISK, copy=False).data).hexdigest()

    @property
    def document(self) -> Document:
        """For a scorer, which says how many of the answer's tokens greedy decoding gets wrong."""
        task = self.task
        name = f"{task.kind} {task.frame} {task.length} depth {task.depth:g} trial {task.number}"
        return Document(name, self.sha256, len(self.tokens), (self.answer,), greedy=True)


def tasks(
    kind: str,
    length: int,
    window: int,
    seed: int = 0,
    depths: Sequence[float] | None = None,
    trials: int | None = None,
) -> tuple[Task, ...]:
    """The trials at one length, depth by depth.

    Parameters
    ----------
    kind: PASSKEY, KEY_VALUE or JSON; or TITLE, with depths (0.0,) and a trial a document.
    window: L0, the model's own window. From 2,048 tokens on it gets the literal frame and 256 tokens for the answer,
        below the compact frame and an eighth of the window; at all lengths the same, so that they can be compared.
    depths, trials: None for the kind's default, 5 x 4 (KEY_VALUE 3 x 7). PAPER_DEPTHS and PAPER_TRIALS for the paper's.
    """
    frame = LITERAL if window >= LITERAL_FROM else COMPACT
    room = ANSWER_ROOM if window >= LITERAL_FROM else window // (LITERAL_FROM // ANSWER_ROOM)
    places = DEPTHS[kind] if depths is None else tuple(depths)
    if not all(0 <= depth <= 1 for depth in places):
        raise LongRopeError(f"A depth is a share of the prompt, from 0 to 1, but the depths are {places}.")
    count = TRIALS[kind] if trials is None else trials
    return tuple(
        Task(kind, frame, length, 0 if kind == PASSKEY else room, depth, number, seed)
        for depth in places
        for number in range(count)
    )


def make_trial(task: Task, tokenizer: Any) -> Trial:
    """The prompt of a PASSKEY, KEY_VALUE or JSON task. The same task and tokenizer give the same tokens.

    Raises
    ------
    TooShort
        The length is too short for the frame.
    LongRopeError
        The tokenizer does not tell digits apart.
    """
    rng = random.Random(f"{task.seed} {task.kind} {task.frame} {task.length} {task.depth} {task.number}")
    if task.kind == PASSKEY:
        return _passkey(task, tokenizer, rng)
    return _pairs(task, tokenizer, rng)


def _passkey(task: Task, tokenizer: Any, rng: random.Random) -> Trial:
    frame = PASSKEY_FRAMES[task.frame]
    value = str(rng.randrange(10_000, 100_000))
    budget = task.length - (tokenizer.bos_token_id is not None)
    after = answer_place(tokenizer, frame.question.format(value=value), value)[1]

    def text(before: int, behind: int, said: str = value) -> str:
        filler = frame.filler * (max(before, behind) // len(frame.filler) + 1)
        needle = frame.needle.format(value=said)
        parts = (frame.opening, filler[:before], needle, filler[:behind], frame.question.format(value=value))
        return "\n".join(part.removesuffix("\n") for part in parts if part)

    @cache
    def count(before: int, behind: int) -> int:
        return len(encode(tokenizer, text(before, behind))) - after

    bare = count(0, 0)
    if bare > budget:
        raise _too_short(task, bare + task.length - budget)
    sample = frame.filler * 64
    rate = len(encode(tokenizer, sample)) / len(sample)
    filler = round((budget - bare) / rate)
    before = round(task.depth * filler)
    held = _exactly(count, budget, rate, before, filler - before)
    if held is None:
        raise LongRopeError(
            f"The filler of a passkey prompt cannot be cut to make exactly {task.length} tokens with this tokenizer; "
            "take another length."
        )
    return _trial(task, tokenizer, lambda said: text(*held, said), frame.question, {}, value, 1 / 90_000)


def _pairs(task: Task, tokenizer: Any, rng: random.Random) -> Trial:
    frame = PAIRS_FRAMES[task.kind, task.frame]
    budget = task.length - task.room - (tokenizer.bos_token_id is not None)
    asked, value = frame.key(rng), frame.value(rng)
    others: list[tuple[str, str]] = []

    def text(count: int, said: str = value) -> str:
        """Of ``count`` pairs beside the one that is asked for, whose key and value no other has."""
        while len(others) < count:
            key, other = frame.key(rng), frame.value(rng)
            if key != asked and other != value:
                others.append((key, other))
        pairs = others[:count]
        pairs.insert(round(task.depth * count), (asked, said))
        lines = frame.between.join(frame.pair.format(key=key, value=each) for key, each in pairs)
        return frame.opening + lines + frame.question.format(key=asked, value=value)

    after = answer_place(tokenizer, frame.question.format(key=asked, value=value), value)[1]

    @cache
    def count(pairs: int) -> int:
        return len(encode(tokenizer, text(pairs))) - after

    bare = count(0)
    if bare > budget:
        raise _too_short(task, bare + task.length - budget)
    rate = (count(16) - bare) / 16
    held = most(count, budget, rate, int((budget - bare) / rate), range(task.length))
    return _trial(task, tokenizer, lambda said: text(held, said), frame.question, {"key": asked}, value, 1 / (held + 1))


def _trial(
    task: Task,
    tokenizer: Any,
    text: Callable[[str], str],
    question: str,
    names: dict[str, str],
    value: str,
    chance: float,
) -> Trial:
    """From the prompt as a function of what its needle says."""
    size, after = answer_place(tokenizer, question.format(value=value, **names), value)
    whole = encode(tokenizer, text(value))
    first = common(whole, encode(tokenizer, text(others_than(value)[0])))  # only the needle says another value there
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = np.array(opening + whole[: len(whole) - after], np.uint32)
    tokens.setflags(write=False)
    start = len(tokens) - size
    return Trial(task, tokens, (start, len(tokens)), value, start - len(opening) - first, chance)


def most(count: Callable[[int], int], budget: int, rate: float, guess: int, allowed: range) -> int:
    """The most pieces, of the numbers allowed, whose tokens are within the budget; the fewest where none are.

    Parameters
    ----------
    count: tokens by number of pieces; it tokenises the whole prompt, so it is asked few times.
    rate: tokens a piece, about; above 0.
    guess: of the answer.
    """
    low, high, n = allowed[0], allowed[-1] + 1, guess
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        left = budget - count(n)
        low, high = (n, high) if left >= 0 else (low, n)
        n += math.floor(left / rate)
    return low


def _exactly(
    count: Callable[[int, int], int], budget: int, rate: float, before: int, behind: int
) -> tuple[int, int] | None:
    """Characters of filler, near those given, that make exactly ``budget`` tokens; None where there are none.

    The longer part is cut: a character more mostly makes one token more or none. Where every cut near by is one token
    off, as a line's end can do, the shorter part gets some characters more.

    Parameters
    ----------
    count: tokens by characters before and behind the needle.
    rate: tokens a character.
    """
    shorter, longer = sorted((before, behind))

    def parts(short: int, long: int) -> tuple[int, int]:
        return (short, long) if before <= behind else (long, short)

    for short in range(shorter, shorter + TRIED):

        def by_longer(n: int, short: int = short) -> int:
            return count(*parts(short, n))

        near = most(by_longer, budget, rate, longer, range(2 * longer + TRIED))
        for long in sorted(range(max(near - TRIED, 0), near + TRIED), key=lambda n: abs(n - near)):
            if by_longer(long) == budget:
                return parts(short, long)
    return None


class TooShort(LongRopeError):
    """A prompt does not fit into its length."""


def _too_short(task: Task, needed: int) -> TooShort:
    return TooShort(
        f"A {task.kind} prompt in the {task.frame} frame needs at least {needed} tokens, but the length is "
        f"{task.length}; take longer ones."
    )


def score_trial(loaded: LoadedModel, trial: Trial, factors: Factors | None) -> bool:
    """Whether greedy decoding gives exactly the answer, by one forward with flat memory.

    Parameters
    ----------
    factors: the rotation; None for the model as it is, or for one in a block of ``sinks.attention_sinks``.
    """
    return wrong_tokens(loaded, trial.tokens, factors, (trial.answer,))[0] == 0
