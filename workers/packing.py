"""Documents packed into training chunks of exactly L tokens, any of which can be had without making those before it.

The documents of an epoch, in an order drawn for it, follow one another in a ring, an EOS after each (a BOS, for a model
without EOS). The ring is cut, from a place drawn for the epoch, into bodies of equal length; a chunk is BOS, a body and
EOS (LongRoPE, section 4.1: chunks bookended with BOS and EOS). So at the borders:

- a document goes on in another chunk where a body ends, and a chunk holds several documents where they are short;
- tokens attend across the documents of a chunk, as in the paper: there is no mask;
- what is left of the ring, less than one body, is not seen in that epoch; in another it lies elsewhere;
- the last chunk may join the end of the ring to its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from searcher.errors import LongRopeError

TokenArray = npt.NDArray[np.uint32]


class ChunkSource(Protocol):
    """Training chunks by number, without end: chunk i is the same whenever and wherever it is asked for."""

    @property
    def length(self) -> int:
        """Tokens of a chunk."""

    def __getitem__(self, index: int, /) -> TokenArray:
        """Chunk ``index``, uint32, shape (length,)."""


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Where things are in one epoch's ring: documents in order, where each ends, where the cut starts, chunk order."""

    number: int
    documents: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    start: int
    order: npt.NDArray[np.int64]


class Chunks:
    """Endless chunks: epoch after epoch, ``per_epoch`` in each, each epoch in an order of its own.

    Attributes
    ----------
    length: tokens of a chunk, BOS and EOS included.
    per_epoch: chunks of an epoch.
    """

    def __init__(
        self, documents: Sequence[TokenArray], length: int, bos: int | None, eos: int | None, seed: int
    ) -> None:
        self.length = length
        self._documents = tuple(documents)
        self._head = [] if bos is None else [bos]
        self._tail = [] if eos is None else [eos]
        self._between = self._tail or self._head
        self._seed = seed
        self._body = length - len(self._head) - len(self._tail)
        self._sizes = np.array([len(document) + len(self._between) for document in self._documents], dtype=np.int64)
        if self._body < 1:
            raise LongRopeError(f"A chunk holds BOS, EOS and at least one token between them, so not {length} tokens.")
        self.per_epoch = int(self._sizes.sum()) // self._body
        if self.per_epoch < 1:
            raise LongRopeError(
                f"The documents to train on have {int(self._sizes.sum())} tokens together, less than one chunk of "
                f"{length}; give more text, or a shorter length."
            )
        self._latest = self._layout(0)

    def __getitem__(self, index: int) -> TokenArray:
        """Chunk ``index`` from 0, without end: uint32, shape (length,). Costs no more for a later one."""
        if index < 0:
            raise IndexError("Chunks are numbered from 0.")
        number, place = divmod(index, self.per_epoch)
        if self._latest.number != number:
            self._latest = self._layout(number)
        epoch = self._latest
        body = self._cut(epoch, epoch.start + int(epoch.order[place]) * self._body)
        return np.concatenate([np.array(self._head, np.uint32), body, np.array(self._tail, np.uint32)])

    def epoch(self, number: int) -> TokenArray:
        """All chunks of one epoch, shape (per_epoch, length)."""
        return np.stack([self[number * self.per_epoch + place] for place in range(self.per_epoch)])

    def _layout(self, number: int) -> _Epoch:
        rng = np.random.default_rng([self._seed, number])
        documents = rng.permutation(len(self._documents))
        ends = np.cumsum(self._sizes[documents])
        return _Epoch(number, documents, ends, int(rng.integers(ends[-1])), rng.permutation(self.per_epoch))

    def _cut(self, epoch: _Epoch, start: int) -> TokenArray:
        """One body of the ring, from a place in it."""
        total = int(epoch.ends[-1])
        body = np.empty(self._body, dtype=np.uint32)
        filled = 0
        while filled < self._body:
            place = (start + filled) % total
            at = int(np.searchsorted(epoch.ends, place, side="right"))
            document = self._documents[int(epoch.documents[at])]
            offset = place - (int(epoch.ends[at]) - len(document) - len(self._between))
            if offset < len(document):
                part = document[offset : offset + self._body - filled]
                body[filled : filled + len(part)] = part
                filled += len(part)
            else:
                body[filled] = self._between[0]
                filled += 1
        return body


def pack(documents: Sequence[TokenArray], length: int, bos: int | None, eos: int | None, seed: int) -> Chunks:
    """Endless chunks of documents, in an order that depends on the seed alone.

    Parameters
    ----------
    documents: tokens of each, uint32, without BOS and EOS; may be mapped from disk, and are read where a chunk is made.
    length: tokens of a chunk, BOS and EOS included. For the short windows of mixed-window training: L0.
    bos, eos: None for a model without one.
    seed: from 0.

    Raises
    ------
    LongRopeError
        All documents together do not fill one chunk.
    """
    return Chunks(documents, length, bos, eos, seed)


def short_documents(documents: Sequence[TokenArray], length: int, bos: int | None, eos: int | None) -> list[TokenArray]:
    """Those that fit into a chunk of ``length`` tokens whole: what LongRoPE2 trains on under the original RoPE.

    Raises
    ------
    LongRopeError
        There are none.
    """
    room = length - (bos is not None) - (eos is not None)
    found = [document for document in documents if len(document) <= room]
    if not found:
        raise LongRopeError(
            f"Mixed-window training needs documents of at most {length} tokens, BOS and EOS included, but the shortest "
            f"of {len(documents)} has {min(map(len, documents), default=0)}; add short text, set short_text to "
            "windows, which cuts the long ones, or mixed_window to 0."
        )
    return found
