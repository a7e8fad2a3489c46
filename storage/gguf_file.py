"""Factors in GGUF files, as llama.cpp reads them: two lists of float32 as tensors, and keys.

llama.cpp takes the long list where its context is longer than the original length, and the short one otherwise, both
under one attention factor. It computes in float32; the exact factors stand beside in keys of our own, which it passes
over. Writing needs the gguf package.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from searcher.errors import LongRopeError, needs
from searcher.rope import Factors, FloatArray
from storage.gguf_header import Header, read_floats, read_header
from storage.imports import Stated, same_float32
from storage.losses import ONE, Room, Taken

LLAMA_CPP = Room("llama.cpp", short=True, attention=ONE)
# Architectures of llama.cpp that load the factors; it refuses a file of any other that has them.
ARCHITECTURES = (
    "apertus", "granite", "granitemoe", "llama", "minicpm", "minicpm3", "mistral3", "phi3", "phimoe",
)  # fmt: skip
# transformers' model_type -> architecture.
FAMILIES = {"granite": "granite", "llama": "llama", "mistral": "llama", "mixtral": "llama", "phi3": "phi3"}
LONG, SHORT, SINGLE = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
EXACT_LONG, EXACT_SHORT, EXACT_ATTENTION = "longrope.long_factor", "longrope.short_factor", "longrope.attention_factor"
EXACT_THETA = "longrope.theta"
COMPARED = 2**24  # bytes at a time


def gguf_package() -> Any:
    """The gguf package.

    Raises
    ------
    LongRopeError
        It is not installed.
    """
    with needs("A GGUF file", "gguf", "gguf"):
        import gguf
    return gguf


def patch_gguf(source: Path, out: Path, taken: Taken) -> None:
    """A copy of a GGUF file with the factors in it.

    Everything else is copied as it is; what the file scaled its RoPE by before is left out. The copy appears at ``out``
    when it is complete and was read back.

    Raises
    ------
    LongRopeError
        llama.cpp does not load factors for the architecture, the file is of another model than the factors, or it
        cannot be read or written.
    """
    gguf, header = gguf_package(), read_header(source)
    _check(header, taken, source)
    with _replacing(out) as aside:
        reader = _reader(gguf, source)
        writer = gguf.GGUFWriter(aside, header.architecture, endianess=reader.endianess)
        writer.data_alignment = reader.alignment  # the key alone, which is copied, does not say it to the writer
        replaced = {name for name, _, _, _ in factor_keys(header.architecture, taken)}
        scaling = f"{header.architecture}.rope.scaling."
        for field in reader.fields.values():
            own = field.name.startswith("GGUF.") or field.name == "general.architecture"
            if own or field.name in replaced or field.name.startswith((scaling, "longrope.")):
                continue
            if field.name == f"{header.architecture}.rope.scale_linear":
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        add_factors(gguf, writer, header.architecture, taken)
        kept = [tensor for tensor in reader.tensors if tensor.name not in (LONG, SHORT, SINGLE)]
        for tensor in kept:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        lists = _tensors(taken)
        for name, values in lists.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in [*(tensor.data for tensor in kept), *lists.values()]:
            writer.write_tensor_data(data, tensor_endianess=reader.endianess)
        writer.close()
        _check_copy(_reader(gguf, aside), kept, aside, taken)


def add_factors(gguf: Any, writer: Any, architecture: str, taken: Taken) -> None:
    """The keys of the factors, into a writer of the gguf package."""
    for name, value, kind, inner in factor_keys(architecture, taken):
        types = gguf.GGUFValueType
        writer.add_key_value(name, value, types[kind], sub_type=None if inner is None else types[inner])


def add_factor_tensors(writer: Any, taken: Taken) -> None:
    """The tensors of the factors, into a writer of the gguf package."""
    for name, values in _tensors(taken).items():
        writer.add_tensor(name, values)


def factor_keys(architecture: str, taken: Taken) -> list[tuple[str, Any, str, str | None]]:
    """Keys of the factors: name, value, GGUF type, and type of a list's elements."""
    (long,), (short,) = taken.long.by_layer(), taken.short.by_layer()
    return [
        (f"{architecture}.context_length", taken.target_length, "UINT32", None),
        (f"{architecture}.rope.scaling.type", "longrope", "STRING", None),
        (f"{architecture}.rope.scaling.original_context_length", taken.model.original_length, "UINT32", None),
        (f"{architecture}.rope.scaling.attn_factor", taken.long.attention_factor, "FLOAT32", None),
        (EXACT_LONG, list(long), "ARRAY", "FLOAT64"),
        (EXACT_SHORT, list(short), "ARRAY", "FLOAT64"),
        (EXACT_ATTENTION, taken.long.attention_factor, "FLOAT64", None),
        (EXACT_THETA, taken.model.theta, "FLOAT64", None),
    ]


def read_gguf(path: Path) -> Stated:
    """What a GGUF file states: the exact factors where ours stand beside, else the shortest decimals of float32.

    Raises
    ------
    LongRopeError
        It holds no factors, is no GGUF file, or its two lists do not fit.
    """
    header = read_header(path)
    long, short = (read_floats(path, header, name) for name in (LONG, SHORT))
    if long is None:
        long = read_floats(path, header, SINGLE)
    if long is None:
        raise LongRopeError(f"{path} holds no factors: neither {LONG} nor {SINGLE} is among its tensors.")
    if short is not None and len(short) != len(long):
        raise LongRopeError(f"{path} has {len(long)} long factors and {len(short)} short ones.")
    attention = header.own("rope.scaling.attn_factor")
    attention = float(attention) if isinstance(attention, int | float) else 1.0
    theta = header.own("rope.freq_base")
    base = _exact_number(header.keys.get(EXACT_THETA), float(theta)) if isinstance(theta, int | float) else None
    families = [name for name, architecture in FAMILIES.items() if architecture == header.architecture]
    return Stated(
        Factors(_exact(header, EXACT_LONG, long)),
        None if short is None else Factors(_exact(header, EXACT_SHORT, short)),
        theta=base,
        theta_is_float32=True,
        original_length=_whole(header.own("rope.scaling.original_context_length")),
        target_length=_whole(header.own("context_length")),
        family=families[0] if len(families) == 1 else None,
        layers=_whole(header.own("block_count")),
        attention=_exact_number(header.keys.get(EXACT_ATTENTION), attention),
        short_attention=None,
    )


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A place beside ``out`` that takes its name when the block is through."""
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as workspace:
            aside = Path(workspace) / out.name
            yield aside
            aside.replace(out)
    except OSError as error:
        raise LongRopeError(f"{out} cannot be written: {error.strerror or error}.") from error


def _check(header: Header, taken: Taken, source: Path) -> None:
    """A GGUF file must be of the model that the factors are of."""
    model, architecture = taken.model, header.architecture
    if architecture not in ARCHITECTURES:
        raise LongRopeError(
            f"llama.cpp loads no factors in {architecture or 'nameless'} models, and refuses a file that has them; it "
            f"does in {', '.join(ARCHITECTURES)}."
        )
    if (_whole(header.keys.get("split.count")) or 1) > 1:
        raise LongRopeError(f"{source} is one part of several; join them with llama-gguf-split --merge first.")
    heads, width = _whole(header.own("attention.head_count")), _whole(header.own("embedding_length"))
    rotated = _whole(header.own("rope.dimension_count")) or _whole(header.own("attention.key_length"))
    if rotated is None and heads and width:
        rotated = width // heads
    theta = header.own("rope.freq_base")
    base = float(theta) if isinstance(theta, int | float) and theta else 10000.0
    found = {
        "architecture": (architecture, FAMILIES.get(model.family, architecture)),
        "block_count": (_whole(header.own("block_count")), model.layers),
        "rope.dimension_count": (rotated, model.rotary_dim),
        "rope.freq_base": (model.theta if same_float32(base, model.theta) else _number(base), model.theta),
    }
    for name, (there, wanted) in found.items():
        if there != wanted:
            raise LongRopeError(
                f"The factors are of {model.name}, with {name} {wanted}, but {source} has {there}; give that model's."
            )


def _reader(gguf: Any, path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise LongRopeError(f"{path} cannot be read by the gguf package: {error}.") from error


def _check_copy(copy: Any, kept: Sequence[Any], path: Path, taken: Taken) -> None:
    """Read back what was written, by the package's reader and by our own, whose ways to the data differ."""
    there = {tensor.name: tensor for tensor in copy.tensors}
    whole = there.keys() == {*(tensor.name for tensor in kept), LONG, SHORT} and all(
        there[tensor.name].tensor_type == tensor.tensor_type and _same_bytes(there[tensor.name].data, tensor.data)
        for tensor in kept
    )
    header = read_header(path)
    for name, values in _tensors(taken).items():
        found = read_floats(path, header, name)
        whole = whole and found is not None and np.array_equal(found, values)
        whole = whole and np.array_equal(there[name].data, values)
    if not whole:
        raise LongRopeError("The copy does not read back as what was written, so it was not kept; this is a bug.")


def _same_bytes(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays in files are alike, a piece at a time: a tensor may be larger than the memory."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return all(
        np.array_equal(first[start : start + COMPARED], second[start : start + COMPARED])
        for start in range(0, len(first), COMPARED)
    )


def _tensors(taken: Taken) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    lists = {LONG: taken.long.by_layer()[0], SHORT: taken.short.by_layer()[0]}
    return {name: np.asarray(values, dtype=np.float32) for name, values in lists.items()}


def _exact(header: Header, key: str, values: FloatArray) -> tuple[float, ...]:
    """Our own list where it is that of the tensor; else the shortest decimals that give the tensor's float32."""
    own = header.keys.get(key)
    if (
        isinstance(own, tuple)
        and len(own) == len(values)
        and np.array_equal(np.asarray(own, np.float32), np.asarray(values, np.float32))
    ):
        return own
    return tuple(float(str(np.float32(value))) for value in values)


def _exact_number(exact: object, value: float) -> float:
    """Our own number where its float32 is what stands there; else the shortest decimals of that."""
    return exact if isinstance(exact, float) and same_float32(exact, value) else float(str(np.float32(value)))


def _number(value: object) -> float | None:
    return float(str(np.float32(value))) if isinstance(value, int | float) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
