"""Tokens in the cache, windows cut from them, and sets that never share a text."""

from __future__ import annotations

import hashlib
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from searcher.errors import LongRopeError
from searcher.study import PARTS
from tests.limits import files_no_larger_than
from workers import dataset
from workers.dataset import (
    DEFAULT_QUOTAS,
    Ask,
    DocumentSets,
    Quota,
    SetSize,
    TokenisedDocument,
    TooFewDocuments,
    cut,
    deal_for,
    default_cache_dir,
    draw_sets,
    named_sets,
    tokenise,
)
from workers.sources import Text

SENTENCES = [
    "The grass is green.",
    "The sky is blue; the sun is yellow.",
    "def there(and_back): return again",
    "café\n",
]
BOS = "<s>"
TEXTS = [Text(f"{i}.txt", f"{i}: {sentence * 3}") for i, sentence in enumerate(SENTENCES)]


def bpe(vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE that would put BOS first if it were let, with a window shorter than any text here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, model_max_length=8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe()


def cache_files(cache: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*") if path.is_file()}


# Tokens and their cache.


@pytest.mark.parametrize("mapped_from", [0, dataset.MAPPED_FROM])
def test_tokens_are_the_tokenisers_own_without_bos_and_mapped_where_they_are_many(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mapped_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MAPPED_FROM", mapped_from)
    documents = tokenise(iter(TEXTS), tokenizer, tmp_path)
    assert [d.name for d in documents] == [t.name for t in TEXTS]
    for document, text in zip(documents, TEXTS, strict=True):
        ids = tokenizer.backend_tokenizer.encode(text.content, add_special_tokens=False).ids
        np.testing.assert_array_equal(document.tokens, np.array(ids, np.uint32), strict=True)
        assert 0 not in ids
        assert document.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
        assert isinstance(document.tokens, np.memmap) == (mapped_from == 0)
        with pytest.raises(ValueError, match="read-only"):
            document.tokens[0] = 1


def test_the_cache_is_used_again_and_by_no_other_tokeniser(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = tokenise(TEXTS, tokenizer, tmp_path)
    files = cache_files(tmp_path)
    assert len(files) == len(TEXTS)
    tokenizer("what a call leaves behind", truncation=True, max_length=2)  # changes the backend's own description
    renamed = [Text("renamed", text.content) for text in TEXTS]
    again = tokenise(renamed, tokenizer, tmp_path)
    assert cache_files(tmp_path) == files
    other = tokenise(TEXTS, bpe(270), tmp_path)
    assert cache_files(tmp_path).items() > files.items()
    assert len(cache_files(tmp_path)) == 2 * len(files)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert len(c.tokens) > len(a.tokens)  # fewer merges


@pytest.mark.parametrize(
    "damage", ["emptied", "checksum only", "cut in a token", "cut between tokens", "longer", "a bit"]
)
def test_a_damaged_cache_file_is_written_anew(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: str) -> None:
    (sound,) = tokenise(TEXTS[:1], tokenizer, tmp_path)
    expected = sound.tokens.tolist()
    (path,) = cache_files(tmp_path)
    data = path.read_bytes()
    path.unlink()  # and not in place: the file that is mapped above must stay as it is
    flipped = bytearray(data)
    flipped[-4] ^= 1
    path.write_bytes(
        {
            "emptied": b"",
            "checksum only": data[:32],
            "cut in a token": data[:-3],
            "cut between tokens": data[:-4],
            "longer": data + b"\0\0\0\0",
            "a bit": bytes(flipped),
        }[damage]
    )
    (mended,) = tokenise(TEXTS[:1], tokenizer, tmp_path)
    assert mended.tokens.tolist() == expected == sound.tokens.tolist()
    assert path.read_bytes() == data
    assert list(cache_files(tmp_path)) == [path]


def test_a_write_that_fails_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    told = pytest.raises(LongRopeError, match=rf"{re.escape(str(tmp_path))}.*cannot be used.*LONGROPE_CACHE")
    with files_no_larger_than(64), told:
        tokenise(TEXTS, tokenizer, tmp_path)
    assert cache_files(tmp_path) == {}


KILLED_WRITER = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from workers.dataset import _write_tokens
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills whoever writes beyond the limit
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
_write_tokens(Path(sys.argv[1]), np.arange(1000, dtype=np.uint32))
"""


def test_a_writer_that_is_killed_leaves_no_cache_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (sound,) = tokenise(TEXTS[:1], tokenizer, tmp_path)
    (path,) = cache_files(tmp_path)
    path.unlink()
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, path], cwd=root, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGXFSZ
    (unfinished,) = cache_files(tmp_path)  # it did get as far as writing
    assert unfinished != path
    (again,) = tokenise(TEXTS[:1], tokenizer, tmp_path)
    assert again.tokens.tolist() == sound.tokens.tolist()


def test_a_cache_that_cannot_be_made_says_what_to_do(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LongRopeError, match=r"cannot be used \(Not a directory\).*LONGROPE_CACHE"):
        tokenise(TEXTS, tokenizer, tmp_path / "file")


def test_megabytes_of_text_are_tokenised_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else caplog would see nothing
    tokenizer = bpe()  # its own, because the warning comes once
    content = " ".join(SENTENCES) * 22_000
    assert len(content) > 2_000_000
    (document,) = tokenise([Text("long.txt", content)], tokenizer, tmp_path)
    assert caplog.records == []
    assert tokenizer.backend_tokenizer.decode(document.tokens.tolist()) == content


def test_a_text_without_tokens_is_an_empty_document(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("-")
    (document,) = tokenise([Text("a", "---")], PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)
    assert document.tokens.shape == (0,)
    assert cut(document, 2, 1, None) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LONGROPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_cache_dir() == tmp_path / ".cache" / "longrope"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/longrope")
    monkeypatch.setenv("LONGROPE_CACHE", "here")
    assert default_cache_dir() == Path("here")


# Windows.


def document(tokens: int, number: int = 0) -> TokenisedDocument:
    """Tokens that occur in no other document, so that no two windows are the same."""
    name = f"{number}.txt"
    return TokenisedDocument(
        name,
        hashlib.sha256(name.encode()).hexdigest(),
        np.arange(number * 100_000 + 10, number * 100_000 + 10 + tokens, dtype=np.uint32),
    )


@given(st.integers(0, 300), st.integers(2, 40), st.integers(1, 12), st.sampled_from([None, 0, 7]))
def test_windows_are_disjoint_whole_and_evenly_spread(n: int, length: int, count: int, bos: int | None) -> None:
    source = document(n)
    body = length if bos is None else length - 1
    windows = cut(source, length, count, bos)
    assert len(windows) == min(count, n // body)
    starts = []
    for window in windows:
        start, end = map(int, re.findall(r"\d+", window.document.name.removeprefix(source.name)))
        starts.append(start)
        expected = ([] if bos is None else [bos]) + source.tokens[start:end].tolist()
        assert window.tokens.tolist() == expected
        assert window.tokens.dtype == np.uint32
        assert not window.tokens.flags.writeable
        assert window.document.length == length == len(window.tokens)
        packed = b"".join(token.to_bytes(4, "little") for token in expected)
        assert window.document.sha256 == hashlib.sha256(packed).hexdigest()
        assert window.source == source.sha256
    assert all(b - a >= body for a, b in pairwise(starts))
    assert all(abs(start - i * n / len(starts)) < 1 for i, start in enumerate(starts))


def test_windows_are_named_by_their_tokens() -> None:
    assert [w.document.name for w in cut(document(6143), 2048, 3, 0)] == [
        "0.txt[0:2047]",
        "0.txt[2047:4094]",
        "0.txt[4095:6142]",
    ]


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_window_of_no_scored_token_is_refused(length: int) -> None:
    with pytest.raises(LongRopeError, match=f"at least 2 tokens, BOS included, but --target is {length}"):
        cut(document(10), length, 1, 0)


# Sets.


def names(sets: DocumentSets) -> dict[str, list[str]]:
    return {part: [window.document.name for window in windows] for part, windows in sets.windows.items()}


quotas = st.fixed_dictionaries({part: st.builds(Quota, st.integers(1, 3), st.integers(1, 3)) for part in PARTS})


@given(st.data(), st.lists(st.integers(0, 90), min_size=9, max_size=25), quotas, st.integers(0, 2**40))
def test_drawn_sets_are_disjoint_and_do_not_depend_on_order(
    data: st.DataObject, lengths: list[int], quotas: Mapping[str, Quota], seed: int
) -> None:
    length, bos = 20, 1
    documents = [document(n, i) for i, n in enumerate(lengths)]
    long_enough = {d.sha256: len(d.tokens) // (length - 1) for d in documents if len(d.tokens) >= length - 1}
    if len(long_enough) < sum(q.documents or 0 for q in quotas.values()):
        with pytest.raises(LongRopeError, match=f"of {len(documents)} documents {len(long_enough)} are that long"):
            draw_sets(documents, length, quotas, seed, bos)
        return
    sets = draw_sets(documents, length, quotas, seed, bos)
    shuffled = draw_sets(data.draw(st.permutations(documents)), length, quotas, seed, bos)
    assert names(shuffled) == names(sets)
    sources = {part: {w.source for w in windows} for part, windows in sets.windows.items()}
    used = set().union(*sources.values())
    assert len(used) == sum(map(len, sources.values()))
    tokens = [token for windows in sets.windows.values() for w in windows for token in w.tokens[1:].tolist()]
    assert len(tokens) == len(set(tokens))
    for part, quota in quotas.items():
        assert quota.documents is not None
        assert len(sources[part]) >= quota.documents
        assert len(sets.windows[part]) == sum(min(quota.windows, long_enough[s]) for s in sources[part])
        assert len(sets.windows[part]) >= quota.documents * quota.windows or used == set(long_enough)
        if sum(min(quota.windows, n) for n in sorted(long_enough.values())[: quota.documents]) == (
            quota.documents * quota.windows
        ):
            assert len(sources[part]) == quota.documents
    assert sets.left_out == tuple(d.name for d in documents if d.sha256 not in long_enough)


def test_the_test_set_has_sixteen_windows_where_the_documents_are_short() -> None:
    one_window = [document(100, i) for i in range(40)]
    sizes = draw_sets(one_window, 64, DEFAULT_QUOTAS, 0, 1).summary()
    assert sizes == {
        "search": SetSize(5, 5, 5 * 63),
        "selection": SetSize(6, 6, 6 * 63),
        "test": SetSize(16, 16, 16 * 63),
    }
    fewer = draw_sets(one_window[:20], 64, DEFAULT_QUOTAS, 0, 1).summary()
    assert [size.documents for size in fewer.values()] == [5, 3, 12]  # the test set is filled first
    long = draw_sets([document(1000, i) for i in range(40)], 64, DEFAULT_QUOTAS, 0, 1).summary()
    assert long == {
        "search": SetSize(5, 5, 5 * 63),
        "selection": SetSize(3, 6, 6 * 63),
        "test": SetSize(4, 16, 16 * 63),
    }


def test_the_draw_is_the_same_on_every_machine_and_differs_by_seed() -> None:
    documents = [document(50, i) for i in range(12)]
    quotas = {"search": Quota(2, 1), "selection": Quota(1, 1), "test": Quota(2, 1)}
    assert names(draw_sets(documents, 50, quotas, 0, None)) == {
        "search": ["11.txt[0:50]", "1.txt[0:50]"],
        "selection": ["4.txt[0:50]"],
        "test": ["0.txt[0:50]", "3.txt[0:50]"],
    }
    assert len({str(names(draw_sets(documents, 50, quotas, seed, None))) for seed in range(20)}) == 20


def test_documents_that_are_not_drawn_do_not_change_the_draw() -> None:
    documents = [document(50, i) for i in range(12)]
    quotas = {"search": Quota(2, 1), "selection": Quota(1, 1), "test": Quota(2, 1)}
    sets = draw_sets(documents, 50, quotas, 3, 0)
    used = {w.source for windows in sets.windows.values() for w in windows}
    fewer = [d for d in documents if d.sha256 in used] + [document(10, 99)]
    assert names(draw_sets(fewer, 50, quotas, 3, 0)) == names(sets)


@given(data=st.data())
def test_a_deal_for_stages_serves_each_at_its_length_or_none_can(data: st.DataObject) -> None:
    """Any set's documents of a stage are long enough and its own; where it is refused, counting says it cannot be."""
    sizes = data.draw(st.lists(st.integers(4, 12), max_size=12))
    documents = [document(size, i) for i, size in enumerate(sizes)]
    counts = st.dictionaries(st.sampled_from(PARTS), st.integers(1, 3), min_size=1)
    wanted = data.draw(st.lists(st.tuples(st.integers(4, 12), counts), min_size=1, max_size=3))
    asks = [Ask(f"s{i}", n, {p: Quota(c, 2) for p, c in by.items()}, by) for i, (n, by) in enumerate(wanted)]
    most = {
        length: sum(max((by.get(part, 0) for n, by in wanted if n >= length), default=0) for part in PARTS)
        for length, _ in wanted
    }
    if any(sum(size >= length for size in sizes) < number for length, number in most.items()):
        with pytest.raises(TooFewDocuments, match=r"^s\d: \d+ documents of at least"):
            deal_for(documents, asks, 0, None)
        return
    chosen = deal_for(documents, asks, 0, None)
    together = [d.sha256 for members in chosen.values() for d in members]
    assert len(together) == len(set(together))
    for length, by in wanted:
        for part, number in by.items():
            assert sum(len(d.tokens) >= length for d in chosen[part]) >= number
    backwards = deal_for(documents[::-1], asks, 0, None)
    assert {part: {d.sha256 for d in members} for part, members in chosen.items()} == {
        part: {d.sha256 for d in members} for part, members in backwards.items()
    }


def test_too_few_long_documents_says_how_many_and_how_long() -> None:
    documents = [document(n, i) for i, n in enumerate([100, 4000, 2047, 2046, 5, 3000])]
    with pytest.raises(LongRopeError) as caught:
        draw_sets(documents, 2048, DEFAULT_QUOTAS, 0, 1)
    assert str(caught.value) == (
        "12 documents of at least 2048 tokens are needed (search 5, selection 3, test 4), but of 6 documents 3 are "
        "that long (tokens of the longest: 4001, 3001, 2048, 2047, 101, 6); lower --target, --search-documents, "
        "--selection-documents or --test-documents, or name more or longer text with --data."
    )


ALL = {part: Quota(None, quota.windows) for part, quota in DEFAULT_QUOTAS.items()}


def test_named_sets_take_what_is_long_enough_and_say_what_is_not() -> None:
    by_part = {
        "search": [document(30, 0), document(500, 1), document(19, 2)],
        "selection": [document(18, 3), document(19, 4)],
        "test": [document(60, 5), document(200, 6)],
    }
    sets = named_sets(by_part, 20, ALL, 1)
    assert names(sets) == {
        "search": ["0.txt[0:19]", "1.txt[0:19]", "2.txt[0:19]"],
        "selection": ["4.txt[0:19]"],
        "test": [f"5.txt[{s}:{s + 19}]" for s in (0, 20, 40)] + [f"6.txt[{s}:{s + 19}]" for s in (0, 50, 100, 150)],
    }
    assert sets.left_out == ("3.txt",)
    assert sets.summary() == {"search": SetSize(3, 3, 57), "selection": SetSize(1, 1, 19), "test": SetSize(2, 7, 133)}


def test_named_sets_with_a_number_take_the_first_and_more_where_they_are_short() -> None:
    by_part = {part: [document(40, 10 * i + j) for j in range(6)] for i, part in enumerate(PARTS)}
    sets = named_sets(by_part, 20, {"search": Quota(2, 1), "selection": Quota(1, 2), "test": Quota(2, 4)}, 1)
    assert {part: size.documents for part, size in sets.summary().items()} == {"search": 2, "selection": 1, "test": 4}
    assert names(sets)["test"][0] == "20.txt[0:19]"
    assert sets.left_out == ()


@pytest.mark.parametrize(("number", "needed"), [(None, 1), (2, 2)])
def test_a_named_set_without_enough_long_documents_is_refused(number: int | None, needed: int) -> None:
    by_part = {"search": [document(50, 0), document(50, 1)], "selection": [document(5, 2)], "test": [document(50, 3)]}
    with pytest.raises(
        LongRopeError, match=rf"{needed} documents.*20 tokens.*\(selection {needed}\).*of 1 documents 0 .*longest: 6\)"
    ):
        named_sets(by_part, 20, {"search": Quota(2, 1), "selection": Quota(number, 1), "test": Quota(1, 1)}, 1)


def test_a_text_in_two_named_sets_is_refused() -> None:
    shared = document(50, 0)
    by_part = {"search": [shared], "selection": [document(50, 1)], "test": [document(50, 2), shared]}
    with pytest.raises(LongRopeError, match=r"0\.txt is in both search and test"):
        named_sets(by_part, 20, ALL, 1)


def test_two_windows_of_the_same_tokens_are_refused() -> None:
    first = document(50, 0)
    longer = TokenisedDocument("longer.txt", "ff" * 32, np.concatenate([first.tokens, first.tokens + 1]))
    with pytest.raises(
        LongRopeError, match=r"0\.txt\[0:19\] \(search\) and longer\.txt\[0:19\] \(test\) hold the same"
    ):
        named_sets({"search": [first], "selection": [document(50, 1)], "test": [longer]}, 20, ALL, 1)
    repeated = TokenisedDocument("repeated.txt", "ee" * 32, np.ones(100, np.uint32))
    with pytest.raises(LongRopeError, match=r"repeated\.txt\[0:19\] \(test\) and repeated\.txt\[25:44\] \(test\)"):
        named_sets({"search": [first], "selection": [document(50, 1)], "test": [repeated]}, 20, ALL, 1)


@pytest.mark.parametrize(("documents", "windows"), [(0, 1), (1, 0), (-1, 2), (None, 0)])
def test_an_empty_quota_is_refused(documents: int | None, windows: int) -> None:
    with pytest.raises(LongRopeError, match="at least 1 document and 1 window"):
        Quota(documents, windows)


def test_a_draw_needs_numbers() -> None:
    with pytest.raises(LongRopeError, match="number of documents"):
        draw_sets([document(50)], 20, ALL, 0, 1)
