"""The header of a GGUF file, read with every length held against the file's own size.

GGUF (version 2 or 3, little-endian): magic, version, number of tensors and of keys; keys with typed values; tensors
with name, shape, type and offset; then the tensors' data, aligned. Nothing is read into memory but what is asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from searcher.errors import LongRopeError
from searcher.rope import FloatArray
from storage.checks import Fault

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY, BOOL = 8, 9, 7
# Type number -> how Python's struct reads it.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
MAX_KEYS, MAX_TENSORS, MAX_STRING, MAX_LIST = 2**16, 2**20, 2**24, 2**16
MAX_KEPT = 2**26
MAX_TEXTS = 2**22  # of all lists together; the largest vocabularies and their merges are a fifth of that
FLOATS = {0: "<f4", 1: "<f2"}  # tensor types whose values are read here

Value = int | float | bool | str | tuple[float, ...]


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is.

    Attributes
    ----------
    shape: fastest dimension first, as GGUF states it.
    kind: GGML's type number.
    offset: in bytes, from the start of the data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Keys (scalars, texts, and short lists of numbers) and tensors of a GGUF file.

    Attributes
    ----------
    data: offset of the first tensor's data in the file, in bytes.
    """

    keys: dict[str, Value]
    tensors: dict[str, Tensor]
    data: int

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's family."""
        return str(self.keys.get("general.architecture", ""))

    def own(self, key: str) -> Value | None:
        """A key of the architecture: ``context_length`` and the like."""
        return self.keys.get(f"{self.architecture}.{key}")


class _Reader:
    """A file that is never read beyond its end."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self.handle, self.size = handle, size
        self.kept = self.texts = 0

    def keep(self, count: int) -> None:
        """Count what goes into memory: the file's size is no bound, for it may be sparse, or all header."""
        self.kept += count
        if self.kept > MAX_KEPT:
            raise Fault(f"its header holds more than {MAX_KEPT >> 20} MiB of names, texts and short lists")

    def take(self, count: int) -> bytes:
        self.fits(count)
        return self.handle.read(count)

    def fits(self, count: int) -> None:
        left = self.size - self.handle.tell()
        if count > left:
            raise Fault(f"{count} bytes are announced at byte {self.handle.tell()} and {left} are left")

    def scalar(self, code: str) -> int | float | bool:
        found: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return found

    def count(self, code: str, most: int, what: str) -> int:
        found = int(self.scalar(code))
        if found > most:
            raise Fault(f"{found} {what} are announced, more than the {most} that any model has")
        return found

    def text(self) -> str:
        count = self.count("Q", MAX_STRING, "bytes of text")
        self.keep(count)
        return self.take(count).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value | None:
        """A key's value; None for lists that are not short ones of numbers, which are passed over."""
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise Fault(f"a key has type {kind}, which GGUF does not know")
        inner, count = int(self.scalar("I")), int(self.scalar("Q"))
        if inner == STRING:
            self.fits(8 * count)
            self.texts += count
            if self.texts > MAX_TEXTS:  # a sparse file has room for any number of empty ones
                raise Fault(f"its lists hold {self.texts} texts, more than the {MAX_TEXTS} that any model has")
            for _ in range(count):
                length = self.count("Q", MAX_STRING, "bytes of text")
                self.fits(length)
                self.handle.seek(length, 1)
            return None
        if inner not in SCALARS:
            raise Fault(f"a list has elements of type {inner}")
        width = struct.calcsize(SCALARS[inner])
        self.fits(width * count)
        if count > MAX_LIST:
            self.handle.seek(width * count, 1)
            return None
        self.keep(32 * count)  # as Python holds them
        return struct.unpack(f"<{count}{SCALARS[inner]}", self.take(width * count))


def read_header(path: Path) -> Header:
    """Keys and tensors of a GGUF file.

    Raises
    ------
    LongRopeError
        It cannot be read, or is not a GGUF file that says how long it is.
    """
    try:
        with path.open("rb") as handle:
            return _header(_Reader(handle, path.stat().st_size))
    except OSError as error:
        raise LongRopeError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Fault as fault:
        raise LongRopeError(f"{path} is not a valid GGUF file: {fault}.") from fault


def read_floats(path: Path, header: Header, name: str) -> FloatArray | None:
    """A small tensor of float32 or float16 as float64, one dimension; None where the file has none of that name.

    Raises
    ------
    LongRopeError
        It is of another type or shape, or lies outside the file.
    """
    tensor = header.tensors.get(name)
    if tensor is None:
        return None
    if tensor.kind not in FLOATS or len(tensor.shape) != 1 or not 0 < tensor.shape[0] <= MAX_LIST:
        raise LongRopeError(f"{name} in {path} must be a list of float32; it has shape {tensor.shape}.")
    kind = np.dtype(FLOATS[tensor.kind])
    start, length = header.data + tensor.offset, tensor.shape[0] * kind.itemsize
    if start + length > path.stat().st_size:
        raise LongRopeError(f"{name} in {path} lies beyond the end of the file; it was cut short.")
    with path.open("rb") as handle:
        handle.seek(start)
        return np.frombuffer(handle.read(length), dtype=kind).astype(np.float64)


def _header(reader: _Reader) -> Header:
    if reader.take(4) != MAGIC:
        raise Fault("it does not begin with GGUF")
    version = int(reader.scalar("I"))
    if version not in VERSIONS:
        raise Fault(f"it has version {version}, and 2 and 3 are known (in little-endian order)")
    tensors = reader.count("Q", MAX_TENSORS, "tensors")
    keys: dict[str, Value] = {}
    for _ in range(reader.count("Q", MAX_KEYS, "keys")):
        name, kind = reader.text(), int(reader.scalar("I"))
        if name in keys:
            raise Fault(f"the key {name[:60]} comes twice")
        value = reader.value(kind)
        if value is not None:
            keys[name] = value
    found: dict[str, Tensor] = {}
    for _ in range(tensors):
        name = reader.text()
        dimensions = reader.count("I", 4, "dimensions of a tensor")
        shape = tuple(int(reader.scalar("Q")) for _ in range(dimensions))
        kind, offset = int(reader.scalar("I")), int(reader.scalar("Q"))
        if name in found:
            raise Fault(f"the tensor {name[:60]} comes twice")
        found[name] = Tensor(shape, kind, offset)
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 0 < alignment <= 2**20:
        raise Fault(f"general.alignment is {alignment!r}")
    end = reader.handle.tell()
    return Header(keys, found, end + (-end) % alignment)
