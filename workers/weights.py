"""The weights of a loaded model as arrays that several workers of one machine read from the same memory.

Reading and hashing a checkpoint costs time and a copy of it for each worker. Here one worker reads; what it hands out
are numpy arrays, which Ray's object store maps read-only into every process of the machine. Models built from them
hold views of that memory on a CPU, and copies on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# In place of types that numpy does not have, such as bfloat16: the same bits as integers, by bytes an element.
_BITS = {1: torch.uint8, 2: torch.int16}


@dataclass(frozen=True)
class SharedWeights:
    """What a model is built from beside its config.

    Attributes
    ----------
    sha256: ``model_digest`` of the folder that the weights were read from.
    architecture: name of the model's class in transformers.
    dtype: the model's, as torch names it (``bfloat16``).
    arrays: by name of the parameter or buffer, its dtype as torch names it, and its elements or their bits. Of tied
        weights only the one that is stored; no buffers that the model computes itself, such as inv_freq.
    """

    sha256: str
    architecture: str
    dtype: str
    arrays: Mapping[str, tuple[str, npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for _, array in self.arrays.values())


def share(model: Any, sha256: str) -> SharedWeights | None:
    """The weights of a model, on a CPU views of its memory, else copies; None where its class is not transformers'."""
    if not type(model).__module__.startswith("transformers."):
        return None
    arrays = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        plain = tensor.detach().cpu().contiguous()
        arrays[name] = (
            _name(tensor.dtype),
            (plain if _in_numpy(plain.dtype) else plain.view(_bits(plain.dtype))).numpy(),
        )
    return SharedWeights(sha256, type(model).__name__, _name(model.dtype), arrays)


def state_dict(shared: SharedWeights) -> dict[str, Tensor]:
    """Tensors over the memory of the arrays, which may be read-only: whoever writes to them ends the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, (_, array) in shared.arrays.items()}
    return {name: tensor.view(getattr(torch, shared.arrays[name][0])) for name, tensor in tensors.items()}


def build(shared: SharedWeights, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A causal model over shared weights, and the loading info, as transformers' ``from_pretrained`` gives it.

    transformers itself ties what is tied and computes the buffers that are not stored, as for a checkpoint on disk.

    Parameters
    ----------
    options: for ``from_pretrained``, beside those for where the weights are and their dtype.
    """
    import transformers

    architecture = getattr(transformers, shared.architecture)
    model, info = architecture.from_pretrained(
        None,
        config=config if isinstance(config, architecture.config_class) else config.get_text_config(),
        state_dict=state_dict(shared),
        dtype=getattr(torch, shared.dtype),
        output_loading_info=True,
        **options,
    )
    return model, info


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(dtype: torch.dtype) -> torch.dtype:
    return _BITS[dtype.itemsize]


def _in_numpy(dtype: torch.dtype) -> bool:
    return hasattr(np, _name(dtype))
