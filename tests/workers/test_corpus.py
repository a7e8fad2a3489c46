"""The documents of a study: requests that survive storage, sets that are named or drawn, and the default's."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from searcher.errors import LongRopeError
from searcher.study import PARTS, REFINE, SHORT
from tests.tiny_models import byte_tokenizer
from workers.corpus import CorpusRequest, evaluation_windows, load_corpus, study_windows
from workers.dataset import DEFAULT_QUOTAS, Quota, Window
from workers.model import load_tokenizer
from workers.needles import plant
from workers.reference import HELD_OUT, MODEL_DIR, held_out_documents, stdlib_dir

LENGTH = 100
DOCUMENTS = 14
TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path_factory.getbasetemp() / "corpus-cache"))


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Fourteen texts of 500 bytes, and one that is too short for a window."""
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(DOCUMENTS):
        (folder / f"{number:02}.txt").write_text("".join(random.Random(number).choices("abcdefgh ", k=500)))
    (folder / "short.txt").write_text("too short")
    return folder


def names(request: CorpusRequest, length: int = LENGTH) -> dict[str, list[str]]:
    sets = load_corpus(request, TOKENIZER, length)
    return {part: [window.document.name for window in windows] for part, windows in sets.windows.items()}


def test_a_request_survives_storage(books: Path) -> None:
    request = CorpusRequest(
        (str(books), "org/dataset:test[:10%]"),
        (str(books / "00.txt"),),
        ("~/books", "~/*.txt"),
        "body",
        {"search": 3},
        {"test": 2, "refine": 5},
        7,
        4,
    )
    assert CorpusRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert CorpusRequest.from_json(json.loads(json.dumps(CorpusRequest().to_json()))) == CorpusRequest()


def test_a_request_stored_before_there_were_needles_has_none() -> None:
    stored = CorpusRequest(("books",), seed=3).to_json()
    del stored["needles"]
    assert CorpusRequest.from_json(stored).needles == 0
    del stored["seed"]
    with pytest.raises(KeyError):
        CorpusRequest.from_json(stored)


def test_paths_are_stored_so_that_they_hold_in_any_folder(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(books.parent)
    request = CorpusRequest(("books", "books/0[0-4].txt", "books/**/*.txt"), ("books/05.txt",), ("books/06.txt",))
    stored = CorpusRequest.from_json(json.loads(json.dumps(request.to_json())))
    assert stored.sources == (str(books), f"{books}/0[0-4].txt", f"{books}/**/*.txt")
    assert (stored.selection, stored.test) == ((f"{books}/05.txt",), (f"{books}/06.txt",))
    few = {"documents": {"search": 1, "selection": 1, "test": 1}}
    relative = CorpusRequest(("books/*.txt",), **few)
    here = names(relative)
    elsewhere = CorpusRequest.from_json(relative.to_json())
    monkeypatch.chdir("/")
    assert names(elsewhere) == here


def test_drawn_sets_have_the_default_sizes_and_share_nothing(books: Path) -> None:
    sets = load_corpus(CorpusRequest((str(books),)), TOKENIZER, LENGTH)
    assert {part: size.windows for part, size in sets.summary().items()} == {"search": 5, "selection": 6, "test": 16}
    sources = {part: {window.source for window in windows} for part, windows in sets.windows.items()}
    assert sum(map(len, sources.values())) == len(set.union(*sources.values()))
    assert sets.left_out == ("short.txt",)
    for windows in sets.windows.values():
        for window in windows:
            assert (len(window.tokens), window.tokens[0]) == (LENGTH, TOKENIZER.bos_token_id)


def test_the_deal_hangs_on_the_seed_alone(books: Path) -> None:
    deals = {seed: names(CorpusRequest((str(books),), seed=seed)) for seed in (0, 1)}
    assert deals[0] == names(CorpusRequest((str(books),), seed=0))
    assert deals[0] != deals[1]


def test_sizes_can_be_stated(books: Path) -> None:
    request = CorpusRequest(
        (str(books),), documents={"search": 2, "selection": 1, "test": 3}, windows={"search": 3, "test": 1}
    )
    assert request.quotas() == {"search": Quota(2, 3), "selection": Quota(1, 2), "test": Quota(3, 1)}
    assert {part: len(windows) for part, windows in names(request).items()} == {"search": 6, "selection": 2, "test": 3}
    assert list(CorpusRequest((str(books),)).quotas()) == list(PARTS)
    assert CorpusRequest((str(books),)).quotas() == DEFAULT_QUOTAS


def test_named_sets_are_the_documents_that_were_named(books: Path) -> None:
    request = CorpusRequest(
        (f"{books}/0[0-3].txt",), (f"{books}/0[4-5].txt",), (f"{books}/0[6-8].txt",), windows={"test": 2}
    )
    named = {part: sorted({name.split("[")[0] for name in ours}) for part, ours in names(request).items()}
    assert named == {
        "search": ["00.txt", "01.txt", "02.txt", "03.txt"],
        "selection": ["04.txt", "05.txt"],
        "test": ["06.txt", "07.txt", "08.txt"],
    }
    assert {part: len(ours) for part, ours in names(request).items()} == {"search": 4, "selection": 4, "test": 6}
    fewer = CorpusRequest(request.sources, request.selection, request.test, documents={"search": 2})
    assert names(fewer)["search"] == names(request)["search"][:2]


def test_named_search_documents_are_as_many_as_by_default_and_the_rest_is_used_whole(books: Path) -> None:
    request = CorpusRequest((f"{books}/0*.txt",), (f"{books}/1[0-1].txt",), (f"{books}/1[2-3].txt",))
    windows = names(request)
    assert [name.split("[")[0] for name in windows["search"]] == [f"0{number}.txt" for number in range(5)]
    assert len(windows["selection"]) == 4
    assert len(windows["test"]) == 10  # eight of each are asked for, so that there are sixteen, but only five fit
    assert len(names(request, 60)["test"]) == 16


def test_a_named_document_of_just_one_window_counts(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(chr(ord("a") + number) * (LENGTH - 1))  # BOS makes it LENGTH tokens
    request = CorpusRequest((f"{tmp_path}/[0-2].txt",), (f"{tmp_path}/3.txt",), (f"{tmp_path}/4.txt",))
    assert {part: len(ours) for part, ours in names(request).items()} == {"search": 3, "selection": 1, "test": 1}
    with pytest.raises(LongRopeError, match="1 documents of at least 101 tokens are needed"):
        names(request, LENGTH + 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("", "04", ""), "Name both --selection-data and --test-data, or neither"),
        (("00", "04", ""), "Name both --selection-data and --test-data, or neither"),
        (("00", "", "04"), "Name both --selection-data and --test-data, or neither"),
        (("", "04", "05"), "Name the search documents with --data"),
        (("00", "04", "00"), "Sets must be disjoint, but the text of 00.txt is in both search and test"),
        (("00", "short", "04"), "1 documents of at least 100 tokens are needed"),
        (("00", "04", "nowhere"), "There is no file or folder"),
    ],
)
def test_requests_that_make_no_study_are_refused(books: Path, parts: tuple[str, str, str], message: str) -> None:
    sources, selection, test = ((str(books / f"{part}.txt"),) if part else () for part in parts)
    with pytest.raises(LongRopeError, match=re.escape(message)):
        names(CorpusRequest(sources, selection, test))


def test_too_little_text_is_refused(books: Path) -> None:
    with pytest.raises(LongRopeError, match="12 documents of at least 600 tokens are needed"):
        names(CorpusRequest((str(books),)), 600)


def test_the_default_is_the_held_out_library() -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    sets = load_corpus(CorpusRequest(), tokenizer, 2048)
    paths = held_out_documents()
    assert {part: len(listed) for part, listed in paths.items()} == {"search": 8, "selection": 6, "test": 12}
    summary = sets.summary()
    assert {part: size.documents for part, size in summary.items()} == {"search": 6, "selection": 6, "test": 12}
    assert {part: size.windows for part, size in summary.items()} == {"search": 6, "selection": 6, "test": 24}
    assert sets.left_out == ()
    for part, windows in sets.windows.items():
        opened = dict.fromkeys(window.document.name.split("[")[0] for window in windows)
        assert list(opened) == [path.name for path in paths[part]][: len(opened)]
    first = sets.windows["search"][0].tokens
    text = (stdlib_dir() / HELD_OUT["search"][0]).read_text(encoding="utf-8")
    assert first[0] == tokenizer.bos_token_id
    assert text.startswith(tokenizer.decode(first[1:200]))


@pytest.mark.parametrize("bos", [True, False])
def test_short_windows_are_the_starts_of_the_test_windows(books: Path, bos: bool) -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    if not bos:
        tokenizer.bos_token = None
    request = CorpusRequest((str(books),))
    sets = study_windows(request, tokenizer, LENGTH, 32)
    assert set(sets.windows) == {*PARTS, REFINE, SHORT}
    assert len(sets.windows[SHORT]) == len(sets.windows["test"]) == 16
    for short, whole in zip(sets.windows[SHORT], sets.windows["test"], strict=True):
        np.testing.assert_array_equal(short.tokens, whole.tokens[:32])
        assert short.document.length == 32
        assert short.source == whole.source
        assert short.document.name.startswith(whole.document.name)
    plain = load_corpus(request, tokenizer, LENGTH)
    for part in PARTS:
        ours, theirs = ([window.document for window in each.windows[part]] for each in (sets, plain))
        assert ours == theirs


def extent(window: Window) -> tuple[str, int, int]:
    """The text a window was cut from, and where it lies in it."""
    found = re.search(r"\[(\d+):(\d+)\]", window.document.name)
    assert found is not None
    return window.source, int(found[1]), int(found[2])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    "windows",
    [{"refine": 3}, {"search": 2, "refine": 3}, {"search": 3, "refine": 1}, {"refine": 9}, {"search": 4, "refine": 3}],
)
@pytest.mark.parametrize("named", [True, False])
def test_refine_windows_are_further_ones_of_the_search_documents(
    books: Path, bos: bool, windows: dict[str, int], named: bool
) -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    if not bos:
        tokenizer.bos_token = None
    sources = (f"{books}/0*.txt",), (f"{books}/1[0-1].txt",), (f"{books}/1[2-3].txt",)
    request = CorpusRequest(*sources, windows=windows) if named else CorpusRequest((str(books),), windows=windows)
    length = 60
    sets = study_windows(request, tokenizer, length, 32)
    plain = load_corpus(request, tokenizer, length)
    for part in PARTS:
        assert [w.document for w in sets.windows[part]] == [w.document for w in plain.windows[part]]
    search, refine = ([extent(w) for w in sets.windows[part]] for part in ("search", REFINE))
    body = length - bos
    ours = dict.fromkeys(source for source, _, _ in search)
    for source in ours:
        further = [(start, end) for s, start, end in refine if s == source]
        taken = sorted([(start, end) for s, start, end in search if s == source] + further)
        assert all(start >= 0 and end == start + body <= 500 for start, end in taken)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        wanted = request.windows[REFINE]
        assert len(further) == wanted or _no_room(taken, body)
    # The first further window of each document, then the second of each.
    rounds = -(-len(refine) // len(ours))
    assert [source for source, _, _ in refine] == (list(ours) * rounds)[: len(refine)]
    texts = {path.name: path.read_text() for path in books.iterdir()}
    for window in sets.windows[REFINE]:
        _, start, end = extent(window)
        text = texts[window.document.name.split("[")[0]]
        assert tokenizer.decode(window.tokens[int(bos) :]) == text[start:end]


def _no_room(taken: list[tuple[int, int]], body: int) -> bool:
    """Every gap between the windows of a document of 500 tokens is shorter than a window."""
    ends, starts = [end for _, end in taken], [start for start, _ in taken[1:]]
    return all(start - end < body for end, start in zip(ends, [*starts, 500], strict=True))


def test_where_a_document_has_no_further_window_it_is_refined_on_with_its_search_windows(books: Path) -> None:
    for number in range(3):
        (books / f"{number:02}.txt").write_text("".join(random.Random(number).choices("abcdefgh ", k=150)))
    request = CorpusRequest((f"{books}/0[0-4].txt",), (f"{books}/10.txt",), (f"{books}/11.txt",), windows={REFINE: 2})
    sets = study_windows(request, TOKENIZER, LENGTH, 32)
    found = [w.document.name.split("[")[0] for w in sets.windows[REFINE]]
    assert found == ["03.txt", "04.txt", "03.txt", "04.txt", "00.txt", "01.txt", "02.txt"]
    search = {w.document for w in sets.windows["search"]}
    assert [w.document in search for w in sets.windows[REFINE]] == [False] * 4 + [True] * 3


def test_without_further_windows_the_search_windows_are_refined_on(books: Path) -> None:
    request = CorpusRequest((str(books),), windows={"search": 2, REFINE: 0})
    sets = study_windows(request, TOKENIZER, LENGTH, 32)
    search = [w.document for w in sets.windows["search"]]
    assert [w.document for w in sets.windows[REFINE]] == search[::2] + search[1::2]


def test_a_further_window_that_another_set_holds_is_left_out(books: Path) -> None:
    """The search document ends as the test document begins."""
    shared, unique = (tokens * (LENGTH - 1) for tokens in ("a", "b"))
    (books / "00.txt").write_text(unique + shared)
    (books / "01.txt").write_text(shared)
    request = CorpusRequest(*((f"{books}/{name}.txt",) for name in ("00", "02", "01")))
    sets = study_windows(request, TOKENIZER, LENGTH, 32)
    assert sets.windows[REFINE] == sets.windows["search"]


def test_needles_are_planted_where_candidates_are_compared_and_nowhere_else(books: Path) -> None:
    plain = study_windows(CorpusRequest((str(books),), seed=5), TOKENIZER, 120, 32)
    sets = study_windows(CorpusRequest((str(books),), seed=5, needles=2), TOKENIZER, 120, 32)
    assert set(sets.windows) == set(plain.windows)
    for part in ("test", SHORT):
        assert [w.document for w in sets.windows[part]] == [w.document for w in plain.windows[part]]
    for part in ("search", "selection", REFINE):
        expected = [plant(w, TOKENIZER, 5, 2).document for w in plain.windows[part]]
        assert [w.document for w in sets.windows[part]] == expected
        assert all(len(w.document.spans) == 2 for w in sets.windows[part])
    sizes = sets.summary()
    assert sizes["search"].tokens == sizes["search"].windows * 2 * 4  # two values of four digits
    assert sizes["test"] == plain.summary()["test"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CorpusRequest(needles=-1), "needles cannot be negative, not -1"),
        (lambda: CorpusRequest(windows={REFINE: -2}), "further windows to refine on cannot be negative, not -2"),
    ],
)
def test_negative_numbers_are_refused(make: Callable[[], CorpusRequest], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        make()


def test_the_reference_documents_have_further_windows_to_refine_on() -> None:
    sets = study_windows(CorpusRequest(windows={REFINE: 3}), load_tokenizer(MODEL_DIR), 2048, 256)
    assert len(sets.windows[REFINE]) == 18
    search, refine = ({w.document.sha256 for w in sets.windows[part]} for part in ("search", REFINE))
    assert len(refine) == 18
    assert not search & refine


def test_windows_to_evaluate_on_come_from_every_document_that_is_long_enough(books: Path) -> None:
    windows = evaluation_windows((str(books),), "text", TOKENIZER, LENGTH, 2)
    assert len(windows) == 2 * DOCUMENTS
    assert {len(window.tokens) for window in windows} == {LENGTH}
    with pytest.raises(LongRopeError, match="documents of at least 600 tokens"):
        evaluation_windows((str(books),), "text", TOKENIZER, 600, 2)
    reference = evaluation_windows((), "text", TOKENIZER, 2048, 1)
    assert [window.document.name.split("[")[0] for window in reference] == [
        path.name for path in held_out_documents()["test"]
    ]
