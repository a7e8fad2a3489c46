"""What candidates that share a document share: the first layer's projections before the rotation.

Everything before the first rotation depends on the tokens alone. Embeddings are looked up again, since fetching them
from here would be the same copy; the linear maps of the first layer that run before its attention are kept, within a
stated limit. A document whose projections do not fit is computed again for every candidate.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

BYTES = 2**25  # of all projections kept, on the model's device


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A block in which a module's forward is another one; what it was before, replaced or not, is back after it."""
    own = module.__dict__.get("forward")  # None: the class's
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class Reached(Protocol):
    """Told by a layer that it has come to its attention."""

    reached: bool


class Shared:
    """One document's projections: while it is first computed, and after.

    Parameters
    ----------
    count: pieces the document is computed in.
    """

    def __init__(self, key: bytes, count: int) -> None:
        self.key = key
        self.count = count
        self.size = 0  # bytes
        self.complete = False
        self.given_up = False
        self.pieces: list[dict[nn.Module, Tensor]] = []

    @contextmanager
    def projections(self, layer: nn.Module, piece: int, cache: Reached) -> Iterator[None]:
        """A block for one call of the layer: its linear maps before the attention give, or leave, their results."""
        if self.complete:
            replaced = {module: _constant(out) for module, out in self.pieces[piece].items()}
        elif not self.given_up:
            cache.reached = False
            self.pieces.append({})
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            replaced = {module: self._keeping(module, cache) for module in linears}
        else:
            replaced = {}
        with ExitStack() as stack:
            for module, forward in replaced.items():
                stack.enter_context(replaced_forward(module, forward))
            yield

    def _keeping(self, module: nn.Module, cache: Reached) -> Callable[[Tensor], Tensor]:
        forward = module.forward

        def run(hidden: Tensor) -> Tensor:
            out: Tensor = forward(hidden)
            if not cache.reached and not self.given_up:
                # Seen with the first piece already: the pieces before the last are alike. A map that runs twice has two
                # results, which are not told apart.
                expected = (self.size + out.nbytes) * self.count / len(self.pieces)
                self.given_up = expected > BYTES or module in self.pieces[-1]
                self.size += out.nbytes
                self.pieces[-1][module] = out
                if self.given_up:
                    self.pieces.clear()
            return out

        return run


class Memo:
    """The documents last used, at most BYTES of them."""

    def __init__(self) -> None:
        self._documents: OrderedDict[bytes, Shared] = OrderedDict()

    def of(self, ids: Tensor, chunk: int, weights: Sequence[Tensor]) -> Shared:
        """A document's projections; empty ones, to be filled, where they are not known.

        Parameters
        ----------
        ids: (1, L).
        chunk: tokens a piece.
        weights: what the projections are computed with; a change of them in place is seen.
        """
        state = repr((chunk, [(weight.data_ptr(), weight._version) for weight in weights]))
        key = hashlib.sha256(state.encode() + ids.cpu().numpy().tobytes()).digest()
        return self._documents.get(key) or Shared(key, -(-ids.shape[1] // chunk))

    def keep(self, shared: Shared) -> None:
        """Remember a document that has been computed, and forget those longest not used beyond the limit."""
        if shared.given_up:
            return
        shared.complete = True
        self._documents[shared.key] = shared
        self._documents.move_to_end(shared.key)
        while sum(each.size for each in self._documents.values()) > BYTES:
            self._documents.popitem(last=False)


def _constant(out: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: out
