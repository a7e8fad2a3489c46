"""Documents to score on: text is tokenised once, cut into windows of L tokens and dealt into disjoint sets."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from searcher.errors import LongRopeError
from searcher.study import PARTS, Document
from workers.sources import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenArray = npt.NDArray[np.uint32]

ON_DISK = np.dtype("<u4")
CHECKSUM_WORDS = 8  # a cache file is the SHA-256 of its tokens, then the tokens
MAPPED_FROM = 2**20  # bytes of a token file that is mapped, not read
LENGTHS_SHOWN = 8  # of the longest documents, where too few are long enough


@dataclass(frozen=True, eq=False)
class TokenisedDocument:
    """One document as tokens.

    Attributes
    ----------
    name: where it comes from, for people.
    sha256: of its text as UTF-8.
    tokens: uint32, (n,), without BOS; read-only, mapped from the cache.
    """

    name: str
    sha256: str
    tokens: TokenArray


@dataclass(frozen=True, eq=False)
class Window:
    """L tokens of one document.

    Attributes
    ----------
    document: what a study knows of it.
    tokens: uint32, (L,), BOS first where there is one; read-only.
    source: sha256 of the text it was cut from.
    """

    document: Document
    tokens: TokenArray
    source: str


@dataclass(frozen=True)
class Quota:
    """What one set gets.

    Attributes
    ----------
    documents: how many; None, only where the user names the sets: every one that is long enough.
    windows: of one document, at most.
    """

    documents: int | None
    windows: int

    def __post_init__(self) -> None:
        if self.windows < 1 or (self.documents is not None and self.documents < 1):
            raise LongRopeError(
                f"A set needs at least 1 document and 1 window of each, but got {self.documents} and {self.windows}; "
                "raise --search-documents, --selection-documents or --test-documents."
            )


@dataclass(frozen=True)
class Ask:
    """What one stage of several asks of the documents.

    Attributes
    ----------
    name: of the stage, for people.
    length: tokens of its windows.
    quotas: by part, what it would have; only the parts it uses, and each with a number of documents.
    needed: by part, the documents it cannot do without.
    """

    name: str
    length: int
    quotas: Mapping[str, Quota]
    needed: Mapping[str, int]


class TooFewDocuments(LongRopeError):
    """Not enough documents are long enough; ``what`` says so without the advice, which is for ``longrope launch``."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; lower --target, --search-documents, --selection-documents or --test-documents, or name more or "
            "longer text with --data."
        )
        self.what = what


DEFAULT_QUOTAS: Mapping[str, Quota] = {"search": Quota(5, 1), "selection": Quota(3, 2), "test": Quota(4, 4)}


@dataclass(frozen=True)
class SetSize:
    """How much text a set holds: documents, windows cut from them, and tokens scored (L - 1 a window, or its spans)."""

    documents: int
    windows: int
    tokens: int


@dataclass(frozen=True, eq=False)
class DocumentSets:
    """Disjoint sets of windows.

    Attributes
    ----------
    windows: part -> its windows, document by document.
    left_out: names of the documents that are too short for a window, in the order they came.
    """

    windows: Mapping[str, tuple[Window, ...]]
    left_out: tuple[str, ...]

    def summary(self) -> dict[str, SetSize]:
        """By part, for whoever reports the study."""

        def scored(document: Document) -> int:
            return sum(end - start for start, end in document.spans) or document.length - 1

        return {
            part: SetSize(len({w.source for w in windows}), len(windows), sum(scored(w.document) for w in windows))
            for part, windows in self.windows.items()
        }


def default_cache_dir() -> Path:
    """``LONGROPE_CACHE``, else ``longrope`` in ``XDG_CACHE_HOME``, else ``~/.cache/longrope``.

    Raises
    ------
    LongRopeError
        None of them is known: no variable is set and the user has no home folder.
    """
    if stated := os.environ.get("LONGROPE_CACHE"):
        return Path(stated)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # the XDG specification has relative ones ignored
        return Path(base) / "longrope"
    try:
        return Path.home() / ".cache" / "longrope"
    except RuntimeError as error:
        raise LongRopeError(
            "Tokens are cached in the home folder, but there is none; set LONGROPE_CACHE to a folder."
        ) from error


def tokenise(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> list[TokenisedDocument]:
    """Every text as tokens, without special tokens of its own; from the cache where this tokeniser has seen it.

    A cache file is named by the text and by the tokeniser, appears whole or not at all, and carries a checksum, so
    that a damaged one is written anew.

    Raises
    ------
    LongRopeError
        The cache cannot be read or written; and what ``texts`` raises.
    """
    folder = cache_dir / "tokens"
    identity = _tokenizer_sha256(tokenizer)
    return [
        TokenisedDocument(
            text.name, text.sha256, _cached_tokens(folder / f"{text.sha256}-{identity[:32]}", text.content, tokenizer)
        )
        for text in texts
    ]


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that decides which tokens a text becomes."""
    if tokenizer.is_fast:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call left behind; ours sets both to none.
        description["truncation"] = description["padding"] = None
    else:
        description = {"vocabulary": tokenizer.get_vocab(), "settings": tokenizer.init_kwargs}
    description["class"] = type(tokenizer).__name__
    description["split_special_tokens"] = tokenizer.split_special_tokens
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()


def _cached_tokens(path: Path, text: str, tokenizer: PreTrainedTokenizerBase) -> TokenArray:
    try:
        tokens = _map_tokens(path)
        if tokens is None:
            # verbose=False: documents are longer than the model's window by design, and the warning would say so.
            encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
            _write_tokens(path, np.asarray(encoded["input_ids"], dtype=ON_DISK))
            tokens = _map_tokens(path)
    except OSError as error:
        raise LongRopeError(
            f"The tokens of --data are cached in {path.parent}, which cannot be used ({error.strerror}); make room "
            "there, or set LONGROPE_CACHE to another folder."
        ) from error
    if tokens is None:
        raise LongRopeError(f"{path} does not hold what was just written to it; set LONGROPE_CACHE to another folder.")
    return tokens


def _map_tokens(path: Path) -> TokenArray | None:
    """None where there is no such file, or a damaged one. A small file is read: a mapping keeps a descriptor open."""
    try:
        size = path.stat().st_size
        small = size < MAPPED_FROM and size % np.dtype(ON_DISK).itemsize == 0
        words: TokenArray = np.fromfile(path, dtype=ON_DISK) if small else np.memmap(path, dtype=ON_DISK, mode="r")
    except FileNotFoundError:
        return None
    except ValueError:  # empty, or not whole tokens
        return None
    words.setflags(write=False)
    checksum, tokens = words[:CHECKSUM_WORDS], words[CHECKSUM_WORDS:]
    return tokens if checksum.tobytes() == hashlib.sha256(tokens.data).digest() else None


def _write_tokens(path: Path, tokens: TokenArray) -> None:
    """Whole or not at all: a file of another name, on the disk before it takes this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with unfinished.open("xb") as file:
            file.write(hashlib.sha256(tokens.data).digest())
            file.write(tokens.data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def cut(document: TokenisedDocument, length: int, count: int, bos: int | None) -> list[Window]:
    """Up to ``count`` disjoint windows, each at the start of its share of the document; none where it is too short.

    So a single window opens where the text does, as BOS before it says.

    Parameters
    ----------
    length: L, tokens with BOS.
    bos: the token that every window starts with; None for a model without one.
    """
    body = _body(length, bos)
    return [window_at(document, start, length, bos) for start in window_starts(len(document.tokens), body, count)]


def window_starts(n: int, body: int, count: int) -> list[int]:
    """Where up to ``count`` disjoint windows of ``body`` tokens begin: each at the start of its share of n tokens."""
    count = min(count, n // body)
    return [i * n // count for i in range(count)]


def window_at(document: TokenisedDocument, start: int, length: int, bos: int | None) -> Window:
    """The window of ``length`` tokens, BOS included, whose text begins at the document's token ``start``."""
    body = _body(length, bos)
    opening = np.array([] if bos is None else [bos], np.uint32)
    tokens = np.concatenate([opening, document.tokens[start : start + body]])
    tokens.setflags(write=False)
    digest = hashlib.sha256(tokens.astype(ON_DISK, copy=False).data).hexdigest()
    name = f"{document.name}[{start}:{start + body}]"
    return Window(Document(name, digest, length), tokens, document.sha256)


def draw_sets(
    documents: Sequence[TokenisedDocument], length: int, quotas: Mapping[str, Quota], seed: int, bos: int | None
) -> DocumentSets:
    """Deal the documents that are long enough into disjoint sets, by chance.

    A document's place in the deal is drawn from the seed and its text alone: it does not depend on the order of the
    files, nor on what else is there. Every set gets its documents; then, the last set first, what is left over goes to
    sets whose documents are too short to give documents x windows windows, until they have as many.

    Parameters
    ----------
    quotas: by part, in the order they are dealt.
    seed: non-negative.

    Raises
    ------
    LongRopeError
        Too few are long enough, or two windows hold the same tokens.
    """
    body = _body(length, bos)
    needed = {part: _required(quota) for part, quota in quotas.items()}
    pool = sorted((d for d in documents if len(d.tokens) >= body), key=lambda d: _place(seed, d))
    if len(pool) < sum(needed.values()):
        raise TooFewDocuments(_shortage(documents, needed, length, bos))
    chosen = {part: [pool.pop(0) for _ in range(number)] for part, number in needed.items()}
    for part in reversed(chosen):
        _top_up(chosen[part], pool, quotas[part], body)
    return _cut_sets(chosen, documents, quotas, length, bos)


def deal_for(
    documents: Sequence[TokenisedDocument], asks: Sequence[Ask], seed: int, bos: int | None
) -> dict[str, list[TokenisedDocument]]:
    """Documents by part, disjoint, that serve stages of several lengths; each asks for its own counts only.

    From the longest stage to the shortest every one gets what it needs beyond what longer ones have, in the order of
    ``draw_sets``; then, in the same order, what is left over goes to sets that have fewer windows than they would. What
    is enough for any deal is enough for this one.

    Raises
    ------
    LongRopeError
        Too few are long enough for a stage.
    """
    pool = sorted(documents, key=lambda d: _place(seed, d))
    chosen: dict[str, list[TokenisedDocument]] = {part: [] for part in PARTS}
    descending = sorted(asks, key=lambda ask: -ask.length)
    needed: dict[str, int] = {}
    for ask in descending:
        body = _body(ask.length, bos)
        needed = {part: max(needed.get(part, 0), ask.needed.get(part, 0)) for part in PARTS}
        free = [d for d in pool if len(d.tokens) >= body]
        missing = {part: number - len(chosen[part]) for part, number in needed.items()}
        if len(free) < sum(max(0, number) for number in missing.values()):
            raise TooFewDocuments(f"{ask.name}: {_shortage(documents, needed, ask.length, bos)}")
        for part, number in missing.items():
            for _ in range(number):
                chosen[part].append(free.pop(0))
        taken = {d.sha256 for members in chosen.values() for d in members}
        pool = [d for d in pool if d.sha256 not in taken]
    for ask in descending:
        body = _body(ask.length, bos)
        for part in reversed([part for part in PARTS if part in ask.quotas]):
            members = [d for d in chosen[part] if len(d.tokens) >= body]
            before = len(members)
            _top_up(members, [d for d in pool if len(d.tokens) >= body], ask.quotas[part], body)
            chosen[part] += members[before:]
            pool = [d for d in pool if d not in members]
    return chosen


def named_sets(
    by_part: Mapping[str, Sequence[TokenisedDocument]], length: int, quotas: Mapping[str, Quota], bos: int | None
) -> DocumentSets:
    """Sets that the user named: of each that has a quota, the first documents that are long enough, or all of them.

    All sets must be disjoint, those without a quota too. Where a quota has a number of documents, further ones are
    taken as in ``draw_sets``, from the same set's.

    Raises
    ------
    LongRopeError
        A text is in two sets, too few of a set are long enough (none, where its quota has no number), or two windows
        hold the same tokens.
    """
    body = _body(length, bos)
    part_of: dict[str, str] = {}
    chosen = {}
    for part, documents in by_part.items():
        for document in documents:
            other = part_of.setdefault(document.sha256, part)
            if other != part:
                raise LongRopeError(
                    f"Sets must be disjoint, but the text of {document.name} is in both {other} and {part}; take it "
                    "out of one of them."
                )
        if part not in quotas:
            continue
        needed = quotas[part].documents or 1
        pool = [d for d in documents if len(d.tokens) >= body]
        if len(pool) < needed:
            raise TooFewDocuments(_shortage(documents, {part: needed}, length, bos))
        if quotas[part].documents is None:
            chosen[part] = pool
        else:
            chosen[part] = pool[:needed]
            _top_up(chosen[part], pool[needed:], quotas[part], body)
    return _cut_sets(chosen, [d for part in chosen for d in by_part[part]], quotas, length, bos)


def _body(length: int, bos: int | None) -> int:
    """Tokens of a window that come from the document."""
    if length < 2:
        raise LongRopeError(f"A window needs at least 2 tokens, BOS included, but --target is {length}; raise it.")
    return length - (bos is not None)


def _required(quota: Quota) -> int:
    if quota.documents is None:
        raise LongRopeError("Sets that are drawn need a number of documents each, but one has none; state it.")
    return quota.documents


def _place(seed: int, document: TokenisedDocument) -> list[int]:
    state: list[int] = np.random.SeedSequence([seed, int(document.sha256, 16)]).generate_state(4).tolist()
    return state


def _top_up(taken: list[TokenisedDocument], pool: list[TokenisedDocument], quota: Quota, body: int) -> None:
    """Move documents from the pool until as many windows are taken as the quota would have with long documents."""
    wanted = _required(quota) * quota.windows
    while pool and sum(min(quota.windows, len(d.tokens) // body) for d in taken) < wanted:
        taken.append(pool.pop(0))


def _cut_sets(
    chosen: Mapping[str, Sequence[TokenisedDocument]],
    documents: Iterable[TokenisedDocument],
    quotas: Mapping[str, Quota],
    length: int,
    bos: int | None,
) -> DocumentSets:
    windows = {
        part: tuple(window for d in members for window in cut(d, length, quotas[part].windows, bos))
        for part, members in chosen.items()
    }
    first: dict[str, str] = {}
    for part, members in windows.items():
        for window in members:
            here = f"{window.document.name} ({part})"
            if (other := first.setdefault(window.document.sha256, here)) is not here:
                raise LongRopeError(
                    f"No two windows may be the same, but {other} and {here} hold the same {length} tokens; take one "
                    "of the documents out of --data."
                )
    body = _body(length, bos)
    return DocumentSets(windows, tuple(d.name for d in documents if len(d.tokens) < body))


def _shortage(documents: Sequence[TokenisedDocument], needed: Mapping[str, int], length: int, bos: int | None) -> str:
    lengths = sorted((len(d.tokens) + (bos is not None) for d in documents), reverse=True)
    longest = ", ".join(map(str, lengths[:LENGTHS_SHOWN])) or "none"
    return (
        f"{sum(needed.values())} documents of at least {length} tokens are needed "
        f"({', '.join(f'{part} {n}' for part, n in needed.items() if n)}), but of {len(documents)} documents "
        f"{sum(n >= length for n in lengths)} are that long (tokens of the longest: {longest})"
    )
