"""The one rotation: rescale factors applied to a transformers model. Needs torch alone, so that others can vendor it.

    angle_i(m) = m * theta^(-2i/d)             for m <  n_hat    (attention factor 1)
    angle_i(m) = m * theta^(-2i/d) / lambda_i  for m >= n_hat    (attention factor as given)

Angles are float64: at two million tokens a float32 ulp is an eighth of a radian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF_SPLIT, INTERLEAVED, SINGLE = "half-split", "interleaved", "single"
_POSITIONS_AT_ONCE = 65536  # bounds the float64 angles that live at one time


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


def _with_rotation(rotation: RescaledRotary) -> Any:
    """A pre-hook that gives one decoder layer its own cos and sin."""

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs["position_embeddings"] = rotation(hidden, kwargs["position_ids"])
        return args, kwargs

    return replace
