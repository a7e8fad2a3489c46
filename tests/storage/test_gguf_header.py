"""GGUF headers of others: what they announce is held against the file before anything is read."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from storage.gguf_file import read_gguf
from storage.gguf_header import read_floats, read_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(keys: bytes = b"", count: int = 0, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + keys


KEY = text("general.architecture") + struct.pack("<I", 8) + text("llama")
LONG = text("rope_factors_long.weight")


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return LONG + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


BAD = {
    "nothing": (b"", "4 bytes are announced at byte 0 and 0 are left"),
    "another format": (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "and 2 and 3 are known"),
    "a list of ten billion": (
        header(text("x") + struct.pack("<IIQ", 9, 12, 10**10), 1),
        "80000000000 bytes are announced",
    ),
    "a list of endless texts": (header(text("x") + struct.pack("<IIQ", 9, 8, 2**60), 1), "bytes are announced"),
    "a list of lists": (header(text("x") + struct.pack("<IIQ", 9, 9, 1), 1), "a list has elements of type 9"),
    "a long key": (header(struct.pack("<Q", 2**40), 1), "bytes of text are announced"),
    "keys without end": (header(b"", 2**40), "keys are announced"),
    "tensors without end": (header(KEY, 1, 2**40), "tensors are announced"),
    "an unknown type": (header(text("x") + struct.pack("<I", 99), 1), "a key has type 99"),
    "a key twice": (header(KEY + KEY, 2), "the key general.architecture comes twice"),
    "a tensor twice": (header(KEY, 1, 2) + 2 * tensor((4,)), "the tensor rope_factors_long.weight comes twice"),
    "many dimensions": (header(KEY, 1, 1) + LONG + struct.pack("<I", 9), "dimensions of a tensor are announced"),
    "no alignment": (header(text("general.alignment") + struct.pack("<II", 4, 0), 1), "general.alignment is 0"),
    "cut short": (header(KEY, 1, 1) + tensor((4,)), "lies beyond the end of the file"),
    "a huge tensor": (header(KEY, 1, 1) + tensor((2**50,)), "must be a list of float32"),
    "a matrix": (header(KEY, 1, 1) + tensor((2, 2)) + bytes(64), "must be a list of float32; it has shape"),
    "a quantised list": (header(KEY, 1, 1) + tensor((32,), kind=8) + bytes(64), "must be a list of float32"),
    "no factors": (header(KEY, 1), "holds no factors"),
    "factors that are zero": (header(KEY, 1, 1) + tensor((4,)) + bytes(64), "must be finite and above 0"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_what_is_no_gguf_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(LongRopeError, match=message):
        read_gguf(tmp_path / "x.gguf")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("lists", [(2**22 + 1,), (2**4, 2**22)])
def test_empty_texts_in_a_sparse_file_are_refused_before_they_are_counted(
    tmp_path: Path, lists: tuple[int, ...]
) -> None:
    path, keys = tmp_path / "x.gguf", b""
    for name, count in zip("xy", lists, strict=False):
        keys += text(name) + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count if count < 2**22 else 0)
    with path.open("wb") as file:
        file.write(header(keys, len(lists)))
        file.truncate(8 * 2**22 + 2**20)
    with pytest.raises(LongRopeError, match=f"its lists hold {sum(lists)} texts, more than the 4194304"):
        read_header(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "x.gguf")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_any_bytes_end_in_a_message_or_in_factors(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, byte: int
) -> None:
    whole = bytearray(header(KEY, 1, 1) + tensor((4,)) + bytes(64) + struct.pack("<4f", 1, 2, 3, 4) + junk)
    whole[at % len(whole)] = byte
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    for data in (bytes(whole), b"GGUF\x03\x00\x00\x00" + junk):
        path.write_bytes(data)
        try:
            found = read_gguf(path)
        except LongRopeError:
            continue
        assert len(found.long.by_layer()[0]) >= 1
        assert read_floats(path, read_header(path), "nothing of that name") is None
