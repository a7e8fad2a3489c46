"""The documents of a study: which text, how much of it, and how it is dealt into sets."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from searcher.errors import LongRopeError
from searcher.study import PARTS, REFINE, SEARCH_SHORT, SHORT
from workers.dataset import (
    DEFAULT_QUOTAS,
    Ask,
    DocumentSets,
    Quota,
    TokenisedDocument,
    TooFewDocuments,
    Window,
    cut,
    deal_for,
    default_cache_dir,
    draw_sets,
    named_sets,
    tokenise,
    window_at,
    window_starts,
)
from workers.needles import plant
from workers.reference import held_out_documents, library_files
from workers.sources import HUB_NAME, read_texts

# The reference documents are few and named. Sized so that the default search ends within minutes on two cores.
REFERENCE_QUOTAS: Mapping[str, Quota] = {"search": Quota(6, 1), "selection": Quota(None, 1), "test": Quota(None, 2)}

LEAST_TEST_WINDOWS = 16  # where the data allow
REFINE_WINDOWS = 0  # further windows of each search document; more did not refine better (benchmarks/NOTES.md)


@dataclass(frozen=True)
class CorpusRequest:
    """What ``--data`` and its companions say.

    Attributes
    ----------
    sources: text for all sets, or for the search set alone where the others are named; empty for the modules of the
        standard library that the reference model was not trained on.
    selection, test: sources of those sets, where the user names them; both or neither.
    text_column: of JSONL and parquet.
    documents, windows: by part, how many documents and how many windows of each; missing parts take the defaults.
        ``windows["refine"]``: further windows of each search document, for gradient refinement.
    seed: of the deal, and of the needles.
    needles: planted in each window of the search, refine and selection sets, and alone scored there; 0 for plain text.
    dealt: by part, the SHA-256 of its documents' texts, where they were dealt before: see ``deal``. Empty: by ``seed``.
    """

    sources: tuple[str, ...] = ()
    selection: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    text_column: str = "text"
    documents: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    needles: int = 0
    dealt: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, number in (("needles", self.needles), ("further windows to refine on", self.further)):
            if number < 0:
                raise LongRopeError(f"The number of {name} cannot be negative, not {number}.")

    @property
    def further(self) -> int:
        """Windows of each search document to refine on, at most."""
        return self.windows.get(REFINE, REFINE_WINDOWS)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` gives an equal object back. Paths become absolute, so resume works anywhere."""
        data = asdict(self)
        for name in ("sources", "selection", "test"):
            data[name] = [absolute(source) for source in data[name]]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CorpusRequest:
        """The inverse of ``to_json``, also of what was stored before there were needles, or deals for many lengths."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data or f.name not in ("needles", "dealt")}
        values["dealt"] = {part: tuple(texts) for part, texts in data.get("dealt", {}).items()}
        for name in ("sources", "selection", "test"):
            values[name] = tuple(values[name])
        return cls(**values)

    def quotas(self) -> dict[str, Quota]:
        """By part, in the order they are dealt."""
        defaults = DEFAULT_QUOTAS if self.sources else REFERENCE_QUOTAS
        return {
            part: Quota(
                self.documents.get(part, defaults[part].documents), self.windows.get(part, defaults[part].windows)
            )
            for part in PARTS
        }

    def named_quotas(
        self, by_part: Mapping[str, Sequence[TokenisedDocument]], length: int, bos: int | None
    ) -> dict[str, Quota]:
        """By part, where the user named the sets: not more search documents than by default, all of the others."""
        usual = self.quotas()
        long_enough = sum(len(document.tokens) + (bos is not None) >= length for document in by_part["search"])
        search = self.documents.get("search", min(long_enough, usual["search"].documents or 1) or 1)
        test = max(usual["test"].windows, -(-LEAST_TEST_WINDOWS // max(1, len(by_part["test"]))))
        return {
            "search": Quota(search, usual["search"].windows),
            "selection": Quota(self.documents.get("selection"), usual["selection"].windows),
            "test": Quota(self.documents.get("test"), self.windows.get("test", test)),
        }


def absolute(source: str) -> str:
    """A path or a glob from the root; what starts with ``~`` and names of datasets mean the same anywhere."""
    is_glob = glob.has_magic(source) and not HUB_NAME.fullmatch(source)
    if not source.startswith("~") and (is_glob or Path(source).exists()):
        return str(Path(source).absolute())
    return source


def load_corpus(request: CorpusRequest, tokenizer: Any, length: int) -> DocumentSets:
    """Read, tokenise (or take from the cache), cut and deal.

    Raises
    ------
    LongRopeError
        Sources are missing or empty, or too few documents hold ``length`` tokens.
    """
    return _deal(request, tokenizer, length)[0]


def _deal(
    request: CorpusRequest, tokenizer: Any, length: int, parts: Sequence[str] = PARTS
) -> tuple[DocumentSets, Sequence[TokenisedDocument]]:
    """The sets of these parts, or of all; and the documents that those of the search set are among."""
    if bool(request.selection) != bool(request.test):
        raise LongRopeError(
            "Name both --selection-data and --test-data, or neither: all sets are then drawn from --data."
        )
    if request.selection and not request.sources:
        raise LongRopeError("Name the search documents with --data beside --selection-data and --test-data.")
    cache = default_cache_dir()

    def tokens(sources: tuple[str, ...]) -> list[TokenisedDocument]:
        return tokenise(read_texts(sources, request.text_column), tokenizer, cache)

    def only(quotas: Mapping[str, Quota]) -> dict[str, Quota]:
        return {part: quotas[part] for part in parts}

    bos = tokenizer.bos_token_id
    if not request.sources:
        by_part = {part: tokens(tuple(str(path) for path in paths)) for part, paths in held_out_documents().items()}
        return named_sets(by_part, length, only(request.quotas()), bos), by_part["search"]
    if request.selection:
        named = zip(PARTS, (request.sources, request.selection, request.test), strict=True)
        by_part = {part: tokens(sources) for part, sources in named}
        return named_sets(by_part, length, only(request.named_quotas(by_part, length, bos)), bos), by_part["search"]
    documents = tokens(request.sources)
    if request.dealt:
        by_part = {part: [d for d in documents if d.sha256 in request.dealt[part]] for part in PARTS}
        return named_sets(by_part, length, only(request.named_quotas(by_part, length, bos)), bos), by_part["search"]
    return draw_sets(documents, length, request.quotas(), request.seed, bos), documents


def deal(request: CorpusRequest, tokenizer: Any, longest: int, asks: Sequence[Ask]) -> CorpusRequest:
    """The request with its documents dealt once, for windows of any length up to ``longest``.

    Which documents are long enough depends on the length, so a deal at each would let one be searched on here and
    tested on there. Where the sets are named there is nothing to deal.

    Parameters
    ----------
    request: with the largest counts that a stage asks for. Where so many documents hold ``longest`` tokens, all are of
        that length.
    asks: of the stages. Where too few hold it, each stage gets what it asks for at its own length: ``deal_for``.

    Raises
    ------
    LongRopeError
        As ``load_corpus``; or too few documents are long enough for a stage.
    """
    if not request.sources or request.selection:
        return request
    try:
        sets = load_corpus(request, tokenizer, longest)
        dealt = {part: tuple(dict.fromkeys(window.source for window in sets.windows[part])) for part in PARTS}
    except TooFewDocuments:
        documents = tokenise(read_texts(request.sources, request.text_column), tokenizer, default_cache_dir())
        chosen = deal_for(documents, asks, request.seed, tokenizer.bos_token_id)
        dealt = {part: tuple(document.sha256 for document in chosen[part]) for part in PARTS}
    return replace(request, dealt=dealt)


def study_windows(
    request: CorpusRequest,
    tokenizer: Any,
    length: int,
    original_length: int,
    short_search: bool = False,
    parts: Sequence[str] = PARTS,
) -> DocumentSets:
    """The sets of a search with two more, and needles planted where they are asked for.

    ``short`` is the start of every test window as a window of the original length. ``refine`` are further windows of
    the search documents, at most as many of each as asked for, disjoint from the search windows; the first of every
    document, then the second of each, and so on. A document without any comes last, with its search windows.
    ``search_short``, where it is asked for, is to the search windows what ``short`` is to the test windows.

    Parameters
    ----------
    parts: the sets that are wanted; text that only others need may be too short. ``refine`` comes with ``search``, and
        ``short`` with ``test``.

    Raises
    ------
    LongRopeError
        As ``load_corpus``; or a window does not hold the needles.
    """
    sets, documents = _deal(request, tokenizer, length, parts)
    bos = tokenizer.bos_token_id
    windows = {part: sets.windows[part] for part in PARTS if part in parts}
    if "search" in parts:
        windows[REFINE] = _refine_windows(sets, documents, request.further, length, bos)
    if request.needles:
        for part in {"search", "selection", REFINE} & windows.keys():
            windows[part] = tuple(plant(w, tokenizer, request.seed, request.needles) for w in windows[part])
    if "test" in parts:
        windows[SHORT] = _starts(windows["test"], tokenizer, original_length)
    if short_search:
        windows[SEARCH_SHORT] = _starts(sets.windows["search"], tokenizer, original_length)
    return replace(sets, windows=windows)


def _refine_windows(
    sets: DocumentSets, documents: Sequence[TokenisedDocument], count: int, length: int, bos: int | None
) -> tuple[Window, ...]:
    document_of = {document.sha256: document for document in documents}
    searched: dict[str, list[Window]] = {}
    for window in sets.windows["search"]:
        searched.setdefault(window.source, []).append(window)
    seen = {window.document.sha256 for windows in sets.windows.values() for window in windows}
    further: dict[str, list[Window]] = {}
    for source, ours in searched.items():
        further[source] = []
        for window in _further_windows(document_of[source], len(ours), count, length, bos):
            if window.document.sha256 not in seen:  # text that repeats itself could bring one of another set back
                seen.add(window.document.sha256)
                further[source].append(window)
    without = [ours for source, ours in searched.items() if not further[source]]
    return (*_in_turn(list(further.values())), *_in_turn(without))


def _further_windows(
    document: TokenisedDocument, searched: int, count: int, length: int, bos: int | None
) -> list[Window]:
    """Up to ``count`` windows between and after the first ``searched``, spread over what these leave."""
    n, body = len(document.tokens), length - (bos is not None)
    taken = window_starts(n, body, searched)
    free: list[int] = []
    for start, end in zip(taken, [*taken[1:], n], strict=True):
        room = end - start - body
        free.extend(start + body + place for place in window_starts(room, body, room // body))
    return [window_at(document, free[i], length, bos) for i in window_starts(len(free), 1, count)]


def _in_turn(lists: Sequence[Sequence[Window]]) -> list[Window]:
    """The first of every list, then the second of each, and so on."""
    return [window for window in chain.from_iterable(zip_longest(*lists)) if window is not None]


def evaluation_windows(
    sources: tuple[str, ...], text_column: str, tokenizer: Any, length: int, windows: int
) -> tuple[Window, ...]:
    """Windows of one length from every document that is long enough; the reference test documents if none is named."""
    documents = evaluation_documents(sources, text_column, tokenizer)
    try:
        sets = named_sets({"test": documents}, length, {"test": Quota(None, windows)}, tokenizer.bos_token_id)
    except TooFewDocuments as error:
        raise LongRopeError(f"{error.what}; lower --lengths, or name more or longer text with --data.") from error
    return sets.windows["test"]


def evaluation_documents(sources: tuple[str, ...], text_column: str, tokenizer: Any) -> list[TokenisedDocument]:
    """Every document of the sources; the reference test documents if none is named."""
    return tokenise(read_texts(sources or reference_test_paths(), text_column), tokenizer, default_cache_dir())


def reference_test_paths() -> tuple[str, ...]:
    """Where the reference test documents are."""
    return tuple(str(path) for path in held_out_documents()["test"])


def training_documents(sources: tuple[str, ...], text_column: str, tokenizer: Any) -> list[TokenisedDocument]:
    """What a fine-tuning reads: ``sources``, or modules that the reference model was trained on if none is named."""
    paths = sources or tuple(str(path) for path in library_files())
    return tokenise(read_texts(paths, text_column), tokenizer, default_cache_dir())


def _starts(windows: Sequence[Window], tokenizer: Any, original_length: int) -> tuple[Window, ...]:
    bos = tokenizer.bos_token_id
    skip = 0 if bos is None else 1
    short: list[Window] = []
    for window in windows:
        tokens = window.tokens[skip : skip + original_length]
        start = TokenisedDocument(f"{window.document.name}/start", window.source, tokens)
        short.extend(cut(start, original_length, 1, bos))
    return tuple(short)
