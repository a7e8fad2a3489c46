"""Decoder layers that stay in host memory and visit the device one after the other, the next one ahead of its use.

The device holds two layers' weights. On CUDA the copy runs on a stream of its own, from pinned memory, beside the
layer that computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]  # of one layer, on the device, by name


def staged(layers: Sequence[nn.Module], device: torch.device | None) -> Iterator[tuple[nn.Module, Weights | None]]:
    """Every layer with its weights on the device; None for weights where the layers are there already.

    Weights are good until the next layer is asked for.

    Parameters
    ----------
    device: where to; None for layers that are not streamed.
    """
    if device is None:
        yield from ((layer, None) for layer in layers)
        return
    slots: list[Weights] = [{}, {}]
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    try:
        _fetch(layers[0], slots[0], device, side)
        for index, layer in enumerate(layers):
            if side is not None:
                torch.cuda.current_stream(device).wait_stream(side)
            if index + 1 < len(layers):
                _fetch(layers[index + 1], slots[(index + 1) % 2], device, side)
            yield layer, slots[index % 2]
    finally:
        if side is not None:  # who stops early frees memory that a copy may still be writing to
            torch.cuda.current_stream(device).wait_stream(side)


def hold_on_host(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Leave the layers' weights in host memory, pinned where they will go to a CUDA device."""
    if device.type != "cuda":
        return
    for layer in layers:
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.data = tensor.data.pin_memory()


def _fetch(layer: nn.Module, slot: Weights, device: torch.device, side: torch.cuda.Stream | None) -> None:
    """Copy a layer's weights into a slot, whose memory is used again where the layers are alike."""
    host = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in host.items()} != {
        name: (tensor.shape, tensor.dtype) for name, tensor in slot.items()
    }:
        slot.clear()
        slot.update({name: torch.empty_like(tensor, device=device) for name, tensor in host.items()})
    if side is not None:
        # All work queued by now, above all the layer that last used the slot, comes first.
        side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side) if side is not None else nullcontext():
        for name, tensor in host.items():
            slot[name].copy_(tensor, non_blocking=True)
