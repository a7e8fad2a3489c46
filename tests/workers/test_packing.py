"""Training chunks: every one full, in an order that the seed alone decides, nothing lost and nothing made up."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from workers.packing import TokenArray, pack, short_documents

BOS, EOS = 0, 1


def documents(sizes: list[int]) -> list[TokenArray]:
    """No token twice, so that where one comes from is known."""
    starts = np.cumsum([2, *sizes])
    return [np.arange(start, start + size, dtype=np.uint32) for start, size in zip(starts, sizes, strict=False)]


def ring(chosen: list[TokenArray], between: list[int]) -> list[int]:
    return [int(token) for document in chosen for token in [*document, *between]]


sizes_of_documents = st.lists(st.integers(0, 40), min_size=1, max_size=12)
special = st.sampled_from([(BOS, EOS), (BOS, None), (None, EOS), (None, None)])


@given(
    sizes=sizes_of_documents, length=st.integers(4, 30), seed=st.integers(0, 3), ends=special, epoch=st.integers(0, 3)
)
@settings(max_examples=300, deadline=None)
def test_an_epoch_is_the_ring_of_its_documents_cut_into_bookended_bodies(
    sizes: list[int], length: int, seed: int, ends: tuple[int | None, int | None], epoch: int
) -> None:
    """Its tokens are the ring's, none twice, less what does not fill a body; and neighbours are neighbours there."""
    bos, eos = ends
    head, tail = [] if bos is None else [bos], [] if eos is None else [eos]
    between = tail or head
    chosen = documents(sizes)
    total = sum(sizes) + len(sizes) * len(between)
    body = length - len(head) - len(tail)
    if total < body:
        with pytest.raises(LongRopeError, match="less than one chunk"):
            pack(chosen, length, bos, eos, seed)
        return
    chunks = pack(chosen, length, bos, eos, seed).epoch(epoch)
    assert chunks.shape == (total // body, length)
    assert chunks.dtype == np.uint32
    whole = ring(chosen, between)
    full = [document for document in chosen if len(document)]
    firsts, lasts = {int(document[0]) for document in full}, {int(document[-1]) for document in full}
    seen: Counter[int] = Counter()
    for chunk in chunks.tolist():
        assert chunk[: len(head)] == head
        assert chunk[length - len(tail) :] == tail
        inside = chunk[len(head) : length - len(tail)]
        seen.update(inside)
        for first, second in pairwise(inside):
            if first in lasts or first in between:
                assert second in between or (second in firsts and (first in between or not between))
            else:
                assert second == first + 1
    assert not seen - Counter(whole)  # nothing made up, nothing twice
    assert sum((Counter(whole) - seen).values()) == total - body * len(chunks)


def test_chunks_are_those_of_the_seed_and_their_number_whatever_was_asked_before() -> None:
    one, other = (pack(documents([50, 9, 70, 31]), 16, BOS, EOS, seed=5) for _ in range(2))
    numbers = list(range(4 * one.per_epoch))
    forwards = {number: one[number].tolist() for number in numbers}
    assert {number: other[number].tolist() for number in np.random.default_rng(0).permutation(numbers)} == forwards
    assert [one[number].tolist() for number in numbers] != [
        pack(documents([50, 9, 70, 31]), 16, BOS, EOS, seed=6)[number].tolist() for number in numbers
    ]


def test_every_epoch_has_cuts_and_an_order_of_its_own() -> None:
    chunks = pack(documents([200]), 20, BOS, EOS, seed=0)
    first, second = chunks.epoch(0), chunks.epoch(1)
    assert {tuple(chunk) for chunk in first.tolist()} != {tuple(chunk) for chunk in second.tolist()}
    starts = first[:, 1].tolist()
    assert starts != sorted(starts)


def test_a_document_is_followed_by_eos_within_a_chunk() -> None:
    (chunk,) = pack(documents([3, 3]), 9, BOS, EOS, seed=0).epoch(0)
    assert len(chunk) == 9
    assert Counter(chunk.tolist())[EOS] >= 2


def test_documents_on_disk_are_read_in_place(tmp_path: Path) -> None:
    plain = documents([40, 60])
    mapped = []
    for number, document in enumerate(plain):
        document.tofile(tmp_path / str(number))
        mapped.append(np.memmap(tmp_path / str(number), dtype=np.uint32, mode="r"))
    assert np.array_equal(pack(mapped, 16, BOS, EOS, 0).epoch(0), pack(plain, 16, BOS, EOS, 0).epoch(0))


def test_a_chunk_without_room_for_a_token_is_refused() -> None:
    with pytest.raises(LongRopeError, match="BOS, EOS"):
        pack(documents([40]), 2, BOS, EOS, 0)
    with pytest.raises(LongRopeError, match="less than one chunk"):
        pack([], 8, BOS, EOS, 0)


def test_short_documents_are_those_that_fit_whole() -> None:
    chosen = documents([6, 7, 8, 30])
    assert [len(document) for document in short_documents(chosen, 9, BOS, EOS)] == [6, 7]
    assert [len(document) for document in short_documents(chosen, 9, BOS, None)] == [6, 7, 8]
    with pytest.raises(LongRopeError, match=r"at most 4 tokens.*short_text"):
        short_documents(chosen, 4, BOS, EOS)
