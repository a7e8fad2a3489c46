"""The exact forward with flat memory: all pieces of the sequence through one decoder layer, then through the next.

Everything that makes a family itself stays its own code. The decoder's own forward runs once for each piece with
recorders in the layers' places: that gives the embeddings and what each layer would have been called with. Then the
layers run, one after the other, each over all pieces in order, with its keys and values so far; the hidden states are
written back in place. Final norm, head and logits are the model's own forward again, with what the last layer returned
handed in.

Peak memory, beyond the weights: hidden states (L x hidden size, held once), keys and values of one layer, cos and sin,
the activations of one piece, and at most ``memo.BYTES`` of projections kept for the next candidate. With
``stream_weights`` the weights on the device are two layers' and what is outside the layers; with ``hidden_on_host`` the
hidden states are in pinned host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from searcher.errors import LongRopeError
from searcher.rope import Factors
from workers.apply import find_rotary
from workers.model import LoadedModel, decoder_layers
from workers.streaming import Weights, staged

CACHES = ("past_key_values", "past_key_value")  # what families call the argument that keeps keys and values


@dataclass(frozen=True)
class _Call:
    """What a decoder layer is called with beside hidden states, for one piece of the sequence."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.inference_mode()
def hidden_states(loaded: LoadedModel, ids: Tensor, factors: Factors | None) -> Tensor:
    """What the last decoder layer returns, before the final norm: (1, L, hidden size), on device or host.

    Parameters
    ----------
    ids: (1, L), on the model's device, unpadded.
    factors: the rotation; None for the model as it is.
    """
    pieces = _pieces(ids.shape[1], loaded.chunk)
    layers = list(decoder_layers(loaded.model))
    with loaded.under(factors), _whole_rotary(loaded.model, ids.shape[1]):
        hidden, calls = _prelude(loaded, ids, pieces)
        shared = loaded.memo.of(ids, loaded.chunk, _first_weights(loaded)) if loaded.chunk is not None else None
        cache = LayerCache(ids.shape[1])
        for index, (layer, weights) in enumerate(staged(layers, loaded.device if loaded.stream_weights else None)):
            cache.filled = 0
            for piece, (start, end) in enumerate(pieces):
                call = calls[piece][index]
                with shared.projections(layer, piece, cache) if shared and index == 0 else nullcontext():
                    out = _through(loaded, layer, weights, hidden[:, start:end], call, cache)
                if len(pieces) == 1 and not loaded.hidden_on_host:
                    hidden = out
                else:
                    hidden[:, start:end].copy_(out, non_blocking=True)
            if shared and index == 0:
                loaded.memo.keep(shared)
    return hidden


@torch.inference_mode()
def logits(loaded: LoadedModel, hidden: Tensor) -> Tensor:
    """The model's logits, (n, vocabulary), of a piece of ``hidden_states``, (1, n, hidden size)."""
    model = loaded.model
    hidden = hidden.to(loaded.device, non_blocking=True)
    with _in_place_of_layers(model, [_Given(hidden)]):
        # One position and a mask of four dimensions, which is taken as it is: nothing is made that no layer will read.
        result: Tensor = model(
            inputs_embeds=hidden,
            position_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device),
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=hidden.dtype, device=hidden.device),
            use_cache=False,
        ).logits[0]
    return result


@torch.inference_mode()
def trial(loaded: LoadedModel, length: int, positions: int) -> None:
    """Hold what a forward of ``length`` tokens holds at its peak, and run a small part of it, the head included.

    Two layers, and of them the last two pieces: each layer needs what every other needs, and the last pieces the most.

    Parameters
    ----------
    positions: how many go through the head at one time.
    """
    ids = torch.zeros(1, length, dtype=torch.long, device=loaded.device)
    pieces = _pieces(length, loaded.chunk)
    factors = Factors((1.0,) * loaded.spec.pairs)
    with loaded.under(factors):
        hidden, calls = _prelude(loaded, ids, pieces)
        cache = LayerCache(length)
        layers = list(decoder_layers(loaded.model))[:2]
        for index, (layer, weights) in enumerate(staged(layers, loaded.device if loaded.stream_weights else None)):
            for piece in range(len(pieces))[-2:]:
                start, end = pieces[piece]
                cache.filled = start
                out = _through(loaded, layer, weights, hidden[:, start:end], calls[piece][index], cache)
                hidden[:, start:end].copy_(out, non_blocking=True)
    row = logits(loaded, hidden[:, -positions:])
    nn.functional.cross_entropy(row.float(), ids[0, : len(row)], reduction="none").sum().item()


class LayerCache:
    """One layer's keys and values so far; in the place of transformers' cache.

    Keys and values of a sequence in one piece are handed back as they came. Else they are copied into memory for the
    whole length, which the next layer uses again.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.filled = 0
        self.reached = False  # whether the layer's attention has been called since this was last set to False
        self._held: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add a piece's keys and values, (1, heads, n, head_dim); all of them so far."""
        self.reached = True
        if key.shape[2] == self.length:
            return key, value
        end = self.filled + key.shape[2]
        if self._held is None or any(
            (held.shape[1], held.shape[3]) != (new.shape[1], new.shape[3])
            for held, new in zip(self._held, (key, value), strict=True)
        ):
            self._held = None
            wide = [(*part.shape[:2], self.length, part.shape[3]) for part in (key, value)]
            self._held = key.new_empty(wide[0]), value.new_empty(wide[1])
        keys, values = self._held
        keys[:, :, self.filled : end] = key
        values[:, :, self.filled : end] = value
        self.filled = end
        return keys[:, :, :end], values[:, :, :end]


def _first_weights(loaded: LoadedModel) -> list[Tensor]:
    """What the projections of the first layer depend on, beside the tokens."""
    return [*loaded.model.get_input_embeddings().parameters(), *next(iter(decoder_layers(loaded.model))).parameters()]


def _pieces(length: int, chunk: int | None) -> list[tuple[int, int]]:
    step = chunk or length
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _prelude(loaded: LoadedModel, ids: Tensor, pieces: Sequence[tuple[int, int]]) -> tuple[Tensor, list[list[_Call]]]:
    """Embeddings, (1, L, hidden size), and the call of every layer for every piece."""
    model, length = loaded.model, ids.shape[1]
    decoder = getattr(model, model.base_model_prefix)
    hidden: Tensor | None = None
    calls: list[list[_Call]] = []
    recorders = [_Recorder(layer) for layer in decoder_layers(model)]
    with _in_place_of_layers(model, recorders):
        for start, end in pieces:
            place = torch.arange(start, end, device=ids.device)[None]
            decoder(input_ids=ids[:, start:end], position_ids=place, use_cache=False)
            embedded = recorders[0].hidden
            calls.append([recorder.call for recorder in recorders])
            for recorder in recorders:
                recorder.forget()
            if len(pieces) == 1 and not loaded.hidden_on_host:
                return embedded, calls
            if hidden is None:
                hidden = _buffer(loaded, (1, length, embedded.shape[-1]), embedded.dtype)
            hidden[:, start:end].copy_(embedded, non_blocking=True)
    assert hidden is not None
    return hidden, calls


def _buffer(loaded: LoadedModel, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not loaded.hidden_on_host:
        return torch.empty(shape, dtype=dtype, device=loaded.device)
    return torch.empty(shape, dtype=dtype, pin_memory=loaded.device.type == "cuda")


def _through(
    loaded: LoadedModel, layer: nn.Module, weights: Weights | None, hidden: Tensor, call: _Call, cache: LayerCache
) -> Tensor:
    """One piece through one layer."""
    kwargs = dict(call.kwargs)
    if loaded.chunk is not None:
        name = next((name for name in CACHES if name in kwargs), None)
        if name is None:
            raise LongRopeError(
                f"The decoder layers of {type(loaded.model).__name__} take no past_key_values, so they cannot run in "
                "pieces; use --attention sdpa."
            )
        kwargs[name] = cache
    args = (hidden.to(loaded.device, non_blocking=True), *call.args)
    out = layer(*args, **kwargs) if weights is None else torch.func.functional_call(layer, weights, args, kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


class _Recorder(nn.Module):
    """In a decoder layer's place: keeps what the layer would have been called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer  # still to be found by whoever looks through the model
        self.hidden = torch.empty(0)
        self.call = _Call((), {})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden_states, _Call(args, kwargs)
        return hidden_states

    def forget(self) -> None:
        self.hidden = torch.empty(0)


class _Given(nn.Module):
    """In all decoder layers' place: returns what it was made with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self._hidden


class _Whole(nn.Module):
    """In a rotary embedding's place: turns by all positions at once, as scalings that depend on the length need."""

    def __init__(self, rotary: nn.Module, length: int) -> None:
        super().__init__()
        self._rotary = rotary
        self._length = length
        self._rows: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self._rows is None:
            self._rows = self._rotary(x, torch.arange(self._length, device=position_ids.device)[None])
        start, count = int(position_ids[0, 0]), position_ids.shape[1]
        cos, sin = self._rows
        return cos[:, start : start + count], sin[:, start : start + count]


@contextmanager
def _whole_rotary(model: nn.Module, length: int) -> Iterator[None]:
    places = find_rotary(model)  # none where the model is under factors, whose rows do not depend on the length
    for parent, name, rotary in places:
        setattr(parent, name, _Whole(rotary, length))
    try:
        yield
    finally:
        for parent, name, rotary in places:
            setattr(parent, name, rotary)


@contextmanager
def _in_place_of_layers(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    layers = decoder_layers(model)
    parent, name = next(
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if child is layers
    )
    setattr(parent, name, nn.ModuleList(modules))
    try:
        yield
    finally:
        setattr(parent, name, layers)
