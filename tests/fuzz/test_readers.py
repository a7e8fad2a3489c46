"""Readers under bytes at random, sound files damaged, and values that nobody expects: no crash, no great memory.

``fuzz_readers.py`` beside this does it guided by coverage, for as long as one likes.
"""

from __future__ import annotations

import copy
import gzip
import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.readers import Reader, readers
from tests.limits import memory_no_more_than

ROOM = 1 << 30  # bytes beyond what the process has already
NAMES = ("factors", "applied", "plan", "text", "jsonl", "parquet", "config", "csv", "gguf", "patch", "weights")
JSON_NAMES = ("factors", "applied", "config", "patch")

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

deep = st.integers(1, 200_000).map(lambda depth: "[" * depth)
odd_numbers = st.sampled_from([float("nan"), float("inf"), -1, 0, 1e-320, 1e308, 2**53 + 1, 10**40, 10**4000, True])
odd = st.one_of(
    odd_numbers,
    st.none(),
    st.text(max_size=20),
    st.sampled_from(["", "\ud800", "../../up", "/etc/passwd", "a\nb", "\x1b[2J", "x" * 100_000, [], {}, [[]], [[[]]]]),
    st.recursive(st.floats() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)
cuts = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Reader]:
    found = readers(tmp_path_factory.mktemp("sound"))
    assert set(found) == set(NAMES)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with memory_no_more_than(ROOM):
        yield tmp_path


def meet(reader: Reader, folder: Path, data: bytes) -> None:
    path = folder / reader.name
    path.write_bytes(data)
    reader.read(path)


@pytest.mark.parametrize("name", NAMES)
def test_sound_files_are_taken(name: str, known: Mapping[str, Reader], tmp_path: Path) -> None:
    """Else the tests below would only see a first check refuse everything."""
    for data in known[name].sound:
        meet(known[name], tmp_path, data)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=300))
@quick
def test_bytes_at_random(name: str, known: Mapping[str, Reader], folder: Path, data: bytes) -> None:
    meet(known[name], folder, data)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), where=cuts)
@quick
def test_damaged_files(
    name: str, known: Mapping[str, Reader], folder: Path, data: st.DataObject, where: list[tuple[float, int, bytes]]
) -> None:
    damaged = data.draw(st.sampled_from(known[name].sound))
    for place, cut, put in where:
        start = int(place * len(damaged))
        damaged = damaged[:start] + put + damaged[start + cut :]
    meet(known[name], folder, damaged)


@pytest.mark.parametrize("name", JSON_NAMES)
@given(data=st.data(), changes=st.integers(1, 3))
@quick
def test_values_that_nobody_expects(
    name: str, known: Mapping[str, Reader], folder: Path, data: st.DataObject, changes: int
) -> None:
    document = json.loads(data.draw(st.sampled_from(known[name].sound)))
    for _ in range(changes):
        document = replaced(document, data)
    meet(known[name], folder, json.dumps(document).encode("utf-8", "surrogatepass"))


def replaced(document: Any, data: st.DataObject) -> Any:
    """A copy with one value changed, left out or put in, somewhere."""
    document = copy.deepcopy(document)
    inner = document
    while isinstance(inner, dict | list) and inner:
        key = data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else list(range(len(inner)))))
        if not isinstance(inner[key], dict | list) or data.draw(st.booleans()):
            how = data.draw(st.sampled_from(["change", "leave out", "put in"]))
            if how == "leave out":
                del inner[key]
            elif how == "change" or isinstance(inner, list):
                inner[key] = data.draw(odd)
            else:
                inner[data.draw(st.text(max_size=5))] = data.draw(odd)
            break
        inner = inner[key]
    return document


LITERALS = st.sampled_from(
    ["nan", "inf", "-1", "0", "1e400", "true", "'x'", "'../up'", "''", "[]", "{}", "[[1]]", "1979-05-27", "9" * 50]
)
KEYS = st.sampled_from(
    [
        *("name", "kind", "length", "model", "factors", "documents", "windows", "outside", "methods"),
        *("preset", "seed", "attention_factor", "n_hats", "upper_ratio", "finalists", "sampler", "racing", "critical"),
        *("evolution", "evolution.population", "evolution.probability", "refinement.steps", "refinement.rate"),
        *("steps", "warmup", "learning_rate", "batch", "fsdp.x", "lora_rank", "tokens"),
        *("lengths", "baselines", "passkey_trials"),
    ]
)
TABLES = st.lists(
    st.tuples(
        st.sampled_from(["search", "finetune", "recover", "evaluate", "compare", "x"]),
        st.dictionaries(KEYS, LITERALS, max_size=3),
    ),
    max_size=4,
)


@given(tables=TABLES)
@quick
def test_plans_of_odd_values(
    known: Mapping[str, Reader], folder: Path, tables: list[tuple[str, dict[str, str]]]
) -> None:
    lines = []
    for kind, values in tables:
        common = {"kind": f"'{kind}'", "length": "'4x'"} if kind != "evaluate" else {"kind": "'evaluate'"}
        lines += ["[[stages]]", *(f"{key} = {value}" for key, value in {**common, **values}.items())]
    meet(known["plan"], folder, "\n".join(lines).encode())


@pytest.mark.parametrize("name", ["factors", "applied", "config", "jsonl", "plan"])
@given(data=st.data())
@settings(quick, max_examples=10)
def test_nested_without_end(name: str, known: Mapping[str, Reader], folder: Path, data: st.DataObject) -> None:
    opened = data.draw(deep)
    text = "a = " + opened.replace("[", "[\n") if name == "plan" else opened.replace("[", '{"a":[')
    meet(known[name], folder, text.encode())


@pytest.mark.parametrize("name", ["weights", "parquet", "gguf"])
@given(length=st.sampled_from([2**31, 10 * 2**30, 2**63 - 1, 2**64 - 1]), rest=st.binary(max_size=64))
@settings(quick, max_examples=20)
def test_lengths_of_gigabytes(name: str, known: Mapping[str, Reader], folder: Path, length: int, rest: bytes) -> None:
    data = length.to_bytes(8, "little") + rest
    if name == "gguf":
        data = known[name].sound[0].replace((8).to_bytes(8, "little"), length.to_bytes(8, "little"))
    if name == "parquet":
        data = b"PAR1" + rest + (length % 2**32).to_bytes(4, "little") + b"PAR1"
    meet(known[name], folder, data)


def test_a_bomb_of_gzip(known: Mapping[str, Reader], tmp_path: Path) -> None:
    """A file of a megabyte that stands for one row of 200."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"a" * 2**20)
    with memory_no_more_than(320 * 2**20):
        known["jsonl"].read(path)


def test_a_sparse_gguf_of_gigabytes(known: Mapping[str, Reader], tmp_path: Path) -> None:
    """Keys of 16 MiB of nothing each, in a file that takes a few blocks of the disk."""
    path, length = tmp_path / "sparse.gguf", 2**24
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 64))
        for number in range(64):
            name = f"key-{number}".encode()
            file.write(struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, length))
            file.seek(length, 1)
        file.truncate()
    with memory_no_more_than(320 * 2**20):
        known["gguf"].read(path)


@pytest.mark.slow
@pytest.mark.timeout(900)  # what is instrumented takes long to import on a busy machine
@pytest.mark.parametrize("name", NAMES)
def test_guided_by_coverage(name: str, tmp_path: Path, process_environment: dict[str, str]) -> None:
    pytest.importorskip("atheris", reason="fuzzing by coverage needs the extra: pip install '.[fuzz]'")
    script = Path(__file__).with_name("fuzz_readers.py")
    fuzz = [sys.executable, str(script), name, "--seconds=20", f"--folder={tmp_path}"]
    ended = subprocess.run(fuzz, env=process_environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
