"""The one rotation: rescale factors applied to a transformers model. Needs torch alone, so that others can vendor it.

    angle_i(m) = m * theta^(-2i/d)             for m <  n_hat    (attention factor 1)
    angle_i(m) = m * theta^(-2i/d) / lambda_i  for m >= n_hat    (attention factor as given)

Angles are float64: at two million tokens a float32 ulp is an eighth of a radian.

``rescaled`` puts a model under one set of factors. ``apply_factors`` puts it under a whole factor file, whose regimes
then follow the length of each sequence:

    applied = apply_factors(model, "factors.json")
    model.generate(**inputs)
    applied.remove()
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import reprlib
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache as memoised
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HALF_SPLIT, INTERLEAVED, SINGLE = "half-split", "interleaved", "single"
# Families whose attention pairs neighbouring dimensions although their cos and sin are laid out in halves.
INTERLEAVED_FAMILIES = ("cohere", "cohere2", "glm", "glm4", "ernie4_5", "gptj", "codegen", "helium")
FORMAT, VERSION = "longrope-factors", 1  # of the factor files that are read
_LARGEST = 8 * 2**20  # bytes of a factor file
_MOST = 2**53  # of whole numbers
_POSITIONS_AT_ONCE = 65536  # bounds the float64 angles that live at one time


class FactorsError(ValueError):
    """Factors or a call that cannot be served: what was expected, what came, what to do."""


class RescaledRotary(nn.Module):
    """Stands in for a transformers rotary embedding: ``(x, position_ids) -> (cos, sin)``.

    Parameters
    ----------
    theta: base of the model's unscaled RoPE.
    lambdas: one rescale factor a rotary pair, highest frequency first; positive.
    n_hat: absolute positions below it keep the original rotation and attention factor 1.
    attention_factor: multiplies cos and sin at all other positions.
    layout: how cos and sin repeat a pair: ``half-split`` (0 1 2 0 1 2), ``interleaved`` (0 0 1 1 2 2) or ``single``.
    cast: whether cos and sin take the dtype of ``x`` (most families) or stay float32 (olmo2).
    """

    def __init__(
        self,
        theta: float,
        lambdas: Sequence[float],
        n_hat: int = 0,
        attention_factor: float = 1.0,
        layout: str = HALF_SPLIT,
        cast: bool = True,
    ) -> None:
        super().__init__()
        factors = torch.tensor(list(lambdas), dtype=torch.float64)
        exponents = torch.arange(len(factors), dtype=torch.float64) / len(factors)
        # Plain attributes, not buffers: model.to(bfloat16) must not round them.
        self.original = theta**-exponents
        self.rescaled = self.original / factors
        self.n_hat = n_hat
        self.attention_factor: float | Tensor = attention_factor
        self.layout = layout
        self.cast = cast

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (batch, positions, width), on the device of ``x``; width is d, or d / 2 for ``single``."""
        return self.rotation(x, position_ids)

    def rotation(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, with the gradient of whatever in it asks for one."""
        dtype = x.dtype if self.cast else torch.float32
        parts = [self._rows(part, dtype) for part in torch.split(position_ids, _POSITIONS_AT_ONCE, dim=-1)]
        cos, sin = (torch.cat(rows, dim=-2).to(x.device) for rows in zip(*parts, strict=True))
        return cos, sin

    def _rows(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if position_ids.device.type == "mps":  # has no float64
            position_ids = position_ids.cpu()
        place = position_ids.to(torch.float64)[..., None]
        start = place < self.n_hat
        angles = place * torch.where(start, self.original.to(place.device), self.rescaled.to(place.device))
        factor = torch.where(start, torch.ones_like(place), self.attention_factor)
        cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return _lay_out(cos, self.layout), _lay_out(sin, self.layout)


def _lay_out(pairs: Tensor, layout: str) -> Tensor:
    if layout == HALF_SPLIT:
        return torch.cat((pairs, pairs), dim=-1)
    if layout == INTERLEAVED:
        return pairs.repeat_interleave(2, dim=-1)
    return pairs


def find_rotary(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every rotary embedding as (parent, attribute, module): a module that keeps inverse frequencies as a buffer."""
    found = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if any(buffer.endswith("inv_freq") for buffer, _ in child.named_buffers(recurse=False)):
                found.append((parent, name, child))
    return found


def cos_layout(cos: Tensor) -> str:
    """How a rotary embedding's cos, (..., width), repeats its pairs, read off a row with distinct angles."""
    half = cos.shape[-1] // 2
    if torch.equal(cos[..., :half], cos[..., half:]):
        return HALF_SPLIT
    if torch.equal(cos[..., 0::2], cos[..., 1::2]):
        return INTERLEAVED
    return SINGLE


@contextmanager
def rescaled(model: nn.Module, layers: Sequence[nn.Module], rotations: Sequence[RescaledRotary]) -> Iterator[None]:
    """The model under the given rotation; the original module is back on exit, bit for bit.

    Parameters
    ----------
    layers: the decoder layers, in order; needed only for factors that differ by layer.
    rotations: one for all layers, or one a layer.
    """
    _refuse_applied(model)
    places = find_rotary(model)
    for parent, name, _ in places:
        setattr(parent, name, rotations[0])
    hooks = []
    if len(rotations) > 1:
        hooks = [
            layer.register_forward_pre_hook(_with_rotation(rotation), with_kwargs=True)
            for layer, rotation in zip(layers, rotations, strict=True)
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parent, name, original in places:
            setattr(parent, name, original)


def _with_rotation(rotation: Any) -> Any:
    """A pre-hook that gives one decoder layer its own cos and sin."""

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs["position_embeddings"] = rotation(hidden, kwargs["position_ids"])
        return args, kwargs

    return replace


@dataclass(frozen=True)
class _Geometry:
    """Where and how a model rotates: ``base`` holds the rotary embedding ``module`` as ``name``, and the layers."""

    base: Any
    name: str
    module: Any
    layers: list[nn.Module]
    theta: float
    pairing: str
    layout: str
    cast: bool
    parameters: dict[str, Any]


@dataclass(frozen=True)
class _Forward:
    """One forward under way.

    Attributes
    ----------
    spans: of each row, which span of lengths it is in.
    new: tokens of the call, per row; the forward is longer where the cache is recomputed.
    seen: (batch, 1 + tokens) on the CPU, what the cache will have seen: each row's span, then its token ids, -1 for one
        that came as an embedding.
    """

    spans: list[int]
    new: int
    recomputed: bool
    cache: Any
    seen: Tensor


_forward: ContextVar[_Forward | None] = ContextVar("longrope_forward", default=None)
_span_numbers = itertools.count()  # never the same for two applied files: a cache of one is not taken for the other's


@dataclass(eq=False)
class Applied:
    """A model under the regimes of a factor file, until ``remove`` or the end of a ``with`` block."""

    model: nn.Module
    _undo: list[Callable[[], None]]

    def remove(self) -> None:
        """Put the model back as it was, bit for bit. Caches filled under the factors are of no use to it."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply_factors(model: nn.Module, factors: str | os.PathLike[str] | Mapping[str, Any]) -> Applied:
    """Put a transformers causal model under a factor file; the regime follows the length of each sequence.

    A row of a batch is as long as it has tokens that its attention mask does not hide, cached ones included, and all of
    it is under the regime of that length: min_length and max_length are both included, a length between two regimes
    gets the longer one, one below the first is left to the model as it was, and one above the last raises. Positions
    count a row's own tokens from 0, so padding on either side changes nothing.

    Cached keys hold for one regime. When a row passes into another, the cache is emptied and filled again from the
    token ids seen, which are kept with the cache: one forward over the whole batch at each border, of which the new
    positions are given out. Beam search, ``crop`` and copies of a cache are followed. A forward of several new tokens
    puts them all under the last one's regime, so speculative decoding may choose other tokens near a border.

    A file serves one model's weights, those it names by their SHA-256, but only the rotation's shape is checked here: a
    file that is for a tuned model is taken by its base, too, and serves it badly.

    Parameters
    ----------
    factors: path of a factor file, or its JSON already parsed.

    Raises
    ------
    FactorsError
        A file that is not valid or of another model; a model whose rotation is not known; factors already applied.
        In a forward: a row longer than the last regime; packed positions or a mask that is not (batch, tokens); a cache
        of fixed size (StaticCache), one filled elsewhere, or one filled from embeddings when it has to be recomputed.
    """
    _refuse_applied(model)
    at = _read_geometry(model)
    if isinstance(factors, Mapping):
        spans = _parse(factors, "The factors", at)
    else:
        spans = _parse(_load(factors), os.fspath(factors), at)
    rotary = _RegimeRotary(at.module, spans, list(inspect.signature(at.base.forward).parameters))
    handles = [
        at.base.register_forward_pre_hook(rotary.before, with_kwargs=True),
        at.base.register_forward_hook(rotary.after, with_kwargs=True, always_call=True),
    ]
    for index, layer in enumerate(at.layers if any(len(span) > 1 for _, span in spans) else ()):
        turn = _with_rotation(partial(rotary.turn, index))
        handles.append(layer.register_forward_pre_hook(turn, with_kwargs=True))
    setattr(at.base, at.name, rotary.train(at.module.training))
    return Applied(model, [handle.remove for handle in handles] + [lambda: setattr(at.base, at.name, at.module)])


def _refuse_applied(model: nn.Module) -> None:
    if any(isinstance(module, _RegimeRotary) for module in model.modules()):
        raise FactorsError("The model is under a factor file already; call remove() on what apply_factors gave first.")


def _read_geometry(model: nn.Module) -> _Geometry:
    """How a model rotates; an error where that is not known."""
    kind, places = type(model).__name__, find_rotary(model)
    if len(places) != 1:
        raise FactorsError(f"{kind} has {len(places)} rotary embeddings; regimes need exactly one for all layers.")
    base: Any
    module: Any
    ((base, name, module),) = places
    config: Any = getattr(base, "config", None)
    parameters, count = getattr(config, "rope_parameters", None), getattr(config, "num_hidden_layers", None)
    stacks = [child for child in base.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if not isinstance(parameters, dict) or "rope_theta" not in parameters or not hasattr(module, "inv_freq"):
        raise FactorsError(f"{kind} rotates by layer type, or in another way that is not known.")
    if not stacks or not {"position_ids", "past_key_values"} <= {*inspect.signature(base.forward).parameters}:
        raise FactorsError(f"The rotary embedding of {kind} is not held by its stack of decoder layers.")
    place = torch.arange(1, 4, device=module.inv_freq.device)[None]
    cos, half = (
        module(torch.zeros(1, dtype=dtype, device=place.device), place)[0] for dtype in (torch.float32, torch.bfloat16)
    )
    layout, pairs, theta = cos_layout(cos), module.inv_freq.numel(), float(parameters["rope_theta"])
    if cos.shape != (1, 3, pairs if layout == SINGLE else 2 * pairs):
        raise FactorsError(f"The rotary embedding of {kind} gives cos of shape {tuple(cos.shape)}, which is not known.")
    plain, own = RescaledRotary(theta, [1.0] * pairs).original, module.inv_freq
    near = max(1e-5, torch.finfo(own.dtype).eps)  # model.to(bfloat16) rounds the model's own frequencies
    if parameters.get("rope_type", "default") == "default" and not torch.allclose(own.double().cpu(), plain, rtol=near):
        raise FactorsError(f"The rotary embedding of {kind} does not follow theta^(-2i/d) with theta = {theta}.")
    neighbours = layout == INTERLEAVED or config.model_type in INTERLEAVED_FAMILIES
    pairing = INTERLEAVED if neighbours else HALF_SPLIT
    cast = half.dtype == torch.bfloat16
    return _Geometry(base, name, module, list(stacks[0]), theta, pairing, layout, cast, parameters)


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        with Path(path).open("rb") as handle:
            data = handle.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST >> 20} MiB, which no factor file is")
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise FactorsError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FactorsError(f"{os.fspath(path)} cannot be read as JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _parse(document: Any, where: str, at: _Geometry) -> list[tuple[int, list[RescaledRotary]]]:
    """Spans of lengths, ascending: the last length, and one rotation, one a layer, or none for the untouched model."""
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise FactorsError(f'{where}: expected an object with "format": "{FORMAT}".')
    if _whole(document, "version", where, 1) > VERSION:
        raise FactorsError(f"{where}: it has version {document['version']}, and this reads up to {VERSION}.")
    regimes: Any
    model, regimes = document.get("model"), document.get("regimes")
    if not isinstance(model, Mapping) or not _is_list(regimes):
        raise FactorsError(f"{where}: expected an object under model and a list of at least one under regimes.")
    pairs, layers = at.module.inv_freq.numel(), len(at.layers)
    for name, own in (("rotary_dim", 2 * pairs), ("layers", layers), ("pairing", at.pairing), ("theta", at.theta)):
        if model.get(name) != own:
            theirs = reprlib.repr(model.get(name))
            raise FactorsError(f"{where} is for a model with {name} {theirs}; this one has {own!r}.")
    spans: list[tuple[int, list[RescaledRotary]]] = []
    for index, regime in enumerate(regimes):
        place = f"{where}: regimes[{index}]"
        if not isinstance(regime, Mapping):
            raise FactorsError(f"{place}: expected an object, found {reprlib.repr(regime)}.")
        shortest = _whole(regime, "min_length", place, spans[-1][0] + 1 if index else 1)
        spans = spans or _untouched(shortest - 1, at.parameters)
        lambdas: Any = regime.get("lambdas")
        rows = lambdas if _is_list(lambdas) and _is_list(lambdas[0]) else [lambdas]
        if len(rows) not in (1, layers) or not all(_is_list(row) and len(row) == pairs for row in rows):
            raise FactorsError(f"{place}: lambdas: expected {pairs} numbers, or {layers} such lists, one a layer.")
        last, n_hat = _whole(regime, "max_length", place, shortest), _whole(regime, "n_hat", place, 0)
        attention = _number(regime.get("attention_factor"), f"{place}: attention_factor")
        factors = [[_number(value, f"{place}: lambdas") for value in row] for row in rows]
        spans.append((last, [RescaledRotary(at.theta, row, n_hat, attention, at.layout, at.cast) for row in factors]))
    return spans


def _untouched(last: int, parameters: dict[str, Any]) -> list[tuple[int, list[RescaledRotary]]]:
    """The spans below the first regime; two of them where the model's own longrope scaling switches in between."""
    kind = str(parameters.get("rope_type", "default"))
    if last and "dynamic" in kind:
        raise FactorsError(
            f"Up to {last} tokens these factors leave the model to its own dynamic scaling, which changes with every "
            "length, so that no cache can follow; begin the first regime at 1."
        )
    switch = int(parameters["original_max_position_embeddings"]) if kind == "longrope" else last
    return [(end, []) for end in sorted({min(switch, last), last}) if end]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _whole(block: Mapping[str, Any], name: str, where: str, least: int) -> int:
    value = block.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        found = reprlib.repr(value)
        raise FactorsError(f"{where}: {name}: expected a whole number of at least {least}, found {found}.")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise FactorsError(f"{where}: expected a finite number above 0, found {reprlib.repr(value)}.")
    return float(value)


class _RegimeRotary(nn.Module):
    """Stands in for a model's rotary embedding, each row of a batch under its own span's rotation.

    Its hooks go around the stack of decoder layers: they settle the span of each row, and what its cache has seen.
    """

    def __init__(self, original: nn.Module, spans: list[tuple[int, list[RescaledRotary]]], names: list[str]) -> None:
        super().__init__()
        self.original = original
        self.ends = [end for end, _ in spans]
        self.numbers = [next(_span_numbers) for _ in spans]
        self.rotations = {number: rotations for number, (_, rotations) in zip(self.numbers, spans, strict=True)}
        self.names = names

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(0, x, position_ids)

    def turn(self, layer: int, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of one layer."""
        under_way = _forward.get()
        if under_way is None:
            raise FactorsError("Under a factor file the rotary embedding works in a forward of its model alone.")
        parts, order = [], []
        for span in sorted({*under_way.spans}):
            rows = [row for row, other in enumerate(under_way.spans) if other == span]
            rotations: Sequence[nn.Module] = self.rotations[span] or [self.original]
            rotation = rotations[layer if len(rotations) > 1 else 0]
            if len(rows) == len(under_way.spans):
                cos, sin = rotation(x, position_ids)
                return cos, sin
            parts.append(rotation(x, position_ids[rows]))
            order += rows
        back = sorted(range(len(order)), key=order.__getitem__)
        cos, sin = (torch.cat(part)[back] for part in zip(*parts, strict=True))
        return cos, sin

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the forward its positions, and all tokens seen where the cache is of another span."""
        _forward.set(None)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids: Any = given.get("input_ids")
        embeddings: Any = given.get("inputs_embeds")
        cache: Any = given.get("past_key_values")
        if (ids is None) == (embeddings is None):
            return None  # the model's own complaint is clear
        tokens = torch.full(embeddings.shape[:2], -1) if ids is None else ids.cpu().long()
        batch, new = tokens.shape
        history = _recall(cache, batch)
        seen = torch.cat([history, tokens], dim=1)
        device = (embeddings if ids is None else ids).device
        lengths, positions = _places(given.get("attention_mask"), given.get("position_ids"), seen, new, device)
        if max(lengths) > self.ends[-1]:
            raise FactorsError(
                f"A row has {max(lengths)} tokens and the factor file ends at {self.ends[-1]}; shorten it, or search "
                "factors for longer sequences."
            )
        spans = [self.numbers[bisect_left(self.ends, length)] for length in lengths]
        recomputed = history.shape[1] > 1 and history[:, 0].tolist() != spans
        if recomputed and bool((seen < 0).any()):
            raise FactorsError(
                "A row came into another regime, and its cache cannot be recomputed: it was filled from inputs_embeds, "
                "whose token ids are not known. Give input_ids, or the whole sequence at once without a cache."
            )
        if recomputed:
            cache.reset()
            if cache.get_seq_length():
                raise FactorsError(f"{type(cache).__name__}.reset() does not empty it; use a DynamicCache.")
            cache._longrope_seen = seen[:0, :0]  # so that it is refused, should this forward fail
            given["input_ids"] = seen[:, 1:].to(device)
        seen[:, 0] = torch.tensor(spans)
        given["position_ids"] = positions if recomputed else positions[:, -new:]
        _forward.set(_Forward(spans, new, recomputed, cache, seen))
        return (), given

    def after(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> Any:
        """Note what the cache has seen; of a recomputed forward, keep the new positions."""
        done = _forward.get()
        _forward.set(None)
        if done is None or output is None:  # it raised
            return None
        values = list(output.values() if isinstance(output, dict) else output)
        cache = done.cache
        if cache is None:
            cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
        if cache is not None and cache.get_seq_length() == done.seen.shape[1] - 1:
            if not hasattr(cache, "_longrope_seen"):
                kind: Any = type(cache)
                cache.__class__ = _following(kind)
            cache._longrope_seen = done.seen
        if not done.recomputed:
            return None
        kept = [_newest(value, done.new) for value in values]
        if not isinstance(output, dict):
            return tuple(kept)
        for name, value in zip(list(output), kept, strict=True):
            output[name] = value
        return output


def _places(mask: Any, given: Any, seen: Tensor, new: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Tokens of each row; the position of each column, (batch, columns), or (1, columns) where nothing is hidden."""
    batch, columns = seen.shape[0], seen.shape[1] - 1
    if mask is None:
        real = torch.ones(1, columns, dtype=torch.bool, device=device)
    elif isinstance(mask, Tensor) and mask.shape == (batch, columns):
        real = mask.to(device) != 0
    else:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise FactorsError(
            f"The length of each row is read off its attention mask, of shape {(batch, columns)} with cached tokens "
            f"included; found {found}."
        )
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    if given is not None:
        fits = given.ndim == 2 and given.shape[0] in (1, batch) and given.shape[1] == new
        if not fits or bool(((given.to(device) != positions[:, -new:]) & real[:, -new:]).any()):
            raise FactorsError(
                "position_ids must count the tokens of each row from 0, padding left out; leave them out to have that "
                "done. Sequences packed into one row cannot be told apart: give each its own row and an attention mask."
            )
    return [columns] * batch if mask is None else real.sum(-1).tolist(), positions


def _recall(cache: Any, batch: int) -> Tensor:
    """What a cache has seen, as in ``_Forward``; the first column alone where it is empty."""
    kind = type(cache).__name__
    if cache is not None and (not hasattr(cache, "get_seq_length") or getattr(cache, "is_compileable", False)):
        raise FactorsError(f"A {kind} cannot be recomputed where the regime changes; use a DynamicCache.")
    length = 0 if cache is None else int(cache.get_seq_length())
    seen: Tensor | None = getattr(cache, "_longrope_seen", None)
    if not length and (seen is None or seen.shape[1]):
        return torch.zeros(batch, 1, dtype=torch.long)
    if seen is None or seen.shape[1] <= length:
        raise FactorsError(
            f"The {kind} holds {length} tokens that did not all come through this model under a factor file; begin "
            "with an empty cache."
        )
    if len(seen) != batch:
        raise FactorsError(f"The {kind} holds {len(seen)} rows and the input has {batch}.")
    return seen[:, : 1 + length]  # what was cropped since is gone from the end


@memoised
def _following(kind: Any) -> Any:
    """A cache's class, such that what moves its rows moves what they have seen; deepcopy copies it too."""

    def moving(method: Any, move: Callable[[Tensor, Any], Tensor]) -> Any:
        def moved(self: Any, how: Any) -> None:
            method(self, how)
            if self._longrope_seen is not None:
                self._longrope_seen = move(self._longrope_seen, how)

        return moved

    moves: dict[str, Callable[[Tensor, Any], Tensor]] = {
        "reorder_cache": lambda seen, rows: seen[rows.cpu()],
        "batch_select_indices": lambda seen, rows: seen[torch.as_tensor(rows).cpu()],
        "batch_repeat_interleave": lambda seen, times: seen.repeat_interleave(times, dim=0),
    }
    methods = {name: moving(getattr(kind, name), move) for name, move in moves.items() if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**methods, "_longrope_seen": None, "__module__": kind.__module__})


def _newest(value: Any, new: int) -> Any:
    """The last ``new`` positions of hidden states (batch, tokens, width) and attention (batch, heads, tokens, keys)."""
    if isinstance(value, tuple):
        return tuple(_newest(part, new) for part in value)
    if isinstance(value, Tensor) and value.ndim in (3, 4):
        return value[:, -new:] if value.ndim == 3 else value[:, :, -new:]
    return value
