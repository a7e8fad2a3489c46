"""Every reader of files that others may have written, as a function of a file's bytes that ends well or raises a bug.

What is accepted is used a little, so that a value that only fails later is found too.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save

from commands.imports import _read
from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.plan_file import BUILT_IN, read_plan
from searcher.rope import Factors
from storage.factor_file import FactorFile, ModelIdentity, Regime, from_json, read, to_json, warnings, write
from storage.imports import imported_file
from tests.tiny_models import random_model, tiny_config
from workers.apply import FactorsError, apply_factors
from workers.headers import stored_shapes
from workers.model import read_original_length
from workers.sources import read_texts

PAIRS, LAYERS, WINDOW = 8, 2, 64  # of the tiny model
SCALE = 4.0
# What a user adds to a form that does not state it.
GIVEN = {"theta": 500.0, "layers": LAYERS, "original_length": WINDOW, "target_length": 256, "family": "llama"}


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read.

    Attributes
    ----------
    name: of the file.
    read: its path -> nothing; raises only what is a bug.
    sound: files that it takes.
    """

    name: str
    read: Callable[[Path], None]
    sound: tuple[bytes, ...]


def _factors(path: Path) -> None:
    try:
        file = read(path)
    except LongRopeError:
        return
    warnings(file)
    assert from_json(json.loads(json.dumps(to_json(file)))) == file
    for regime in file.regimes:
        assert all(math.isfinite(value) and value > 0 for row in regime.factors.by_layer() for value in row)


@cache
def _model() -> Any:
    torch.set_num_threads(1)
    return random_model(tiny_config("llama"))


def _applied(path: Path) -> None:
    """The reader that others vendor: what it takes is served."""
    try:
        applied = apply_factors(_model(), path)
    except FactorsError:
        return
    with applied, torch.no_grad(), suppress(FactorsError):  # longer than the file's last regime
        _model()(input_ids=torch.tensor([[0, 5, 6]]))


def _plan(path: Path) -> None:
    try:
        plan = read_plan(str(path), WINDOW)
    except LongRopeError:
        return
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for stage in plan.stages:  # its folder lies in the study's
        assert (Path("study") / stage.name).parts == ("study", stage.name)


def _texts(path: Path) -> None:
    try:
        texts = list(read_texts([path]))
    except LongRopeError:
        return
    assert all(text.content.strip() for text in texts)
    assert len({text.sha256 for text in texts}) == len(texts)


def _config(path: Path) -> None:
    weights = path.with_name("model.safetensors")
    weights.touch()
    try:
        length = read_original_length(str(path.parent))
    except LongRopeError:
        return
    assert isinstance(length, int)
    assert length >= 2


def _weights(path: Path) -> None:
    try:
        shapes = stored_shapes(path.parent)
    except LongRopeError:
        return
    assert sum(map(math.prod, shapes.values())) <= 8 * path.stat().st_size


def _imported(path: Path) -> None:
    """CSV, GGUF and configs of other programs, with what they do not state."""
    try:
        form, stated = _read(path)
        missing = {key: value for key, value in GIVEN.items() if getattr(stated, key) is None}
        write(path.with_name("imported.json"), imported_file(stated, missing, None, 0, form))
    except LongRopeError:
        return
    assert read(path.with_name("imported.json")).regimes


def _gguf() -> bytes:
    """A header with a key of every kind that is read, and two tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    long, short = [1.0 + pair for pair in range(PAIRS)], [1.0] * PAIRS
    keys = [
        ("general.architecture", 8, text("llama")),
        ("llama.context_length", 4, struct.pack("<I", 256)),
        ("llama.block_count", 4, struct.pack("<I", LAYERS)),
        ("llama.rope.freq_base", 6, struct.pack("<f", 500.0)),
        ("llama.rope.scaling.original_context_length", 4, struct.pack("<I", WINDOW)),
        ("llama.rope.scaling.attn_factor", 6, struct.pack("<f", 1.25)),
        ("longrope.long_factor", 9, struct.pack(f"<IQ{PAIRS}d", 12, PAIRS, *long)),
        ("longrope.attention_factor", 12, struct.pack("<d", 1.25)),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
    ]
    tensors = [("rope_factors_long.weight", 0), ("rope_factors_short.weight", 4 * PAIRS)]
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    data += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
    data += b"".join(text(name) + struct.pack("<IQIQ", 1, PAIRS, 0, offset) for name, offset in tensors)
    return data + bytes(-len(data) % 32) + struct.pack(f"<{2 * PAIRS}f", *long, *short)


def _sound_factors(folder: Path) -> tuple[bytes, ...]:
    spec = ModelIdentity("tiny", "0" * 64, "llama", 500.0, 2 * PAIRS, WINDOW, LAYERS, "half-split")
    one = BASELINES["yarn"](spec.spec, SCALE)
    rows = Factors((one.by_layer()[0], (1.0,) * PAIRS), 4, 1.1)
    provenance = {"study": "mine", "seed": 0, "data": {}, "software": {}}
    files = (
        FactorFile(spec, (Regime(1, 256, one, "su"),), provenance),
        FactorFile(spec, (Regime(1, 64, rows, "none"), Regime(65, 256, one, "1.25")), provenance),
    )
    path = folder / "sound.json"
    found = []
    for file in files:
        write(path, file)
        found.append(path.read_bytes())
    return tuple(found)


def _parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def readers(folder: Path) -> dict[str, Reader]:
    """All of them; ``folder`` is for what has to be written to have sound files."""
    factors = _sound_factors(folder)
    plans = tuple(path.read_bytes() for path in sorted(BUILT_IN.glob("*.toml")))
    rows = b'{"text": "once upon a time"}\n{"text": "and again", "id": 1}\n'
    table = _parquet(text=["once upon a time", None, "and again"], id=[1, 2, 3])
    config = json.dumps(tiny_config("llama").to_dict()).encode()
    scaling = {"rope_type": "longrope", "rope_theta": 500.0, "long_factor": [2.0] * PAIRS, "short_factor": [1] * PAIRS}
    lengths = {"original_max_position_embeddings": WINDOW, "max_position_embeddings": 256, "num_hidden_layers": LAYERS}
    patch = json.dumps({**lengths, "model_type": "llama", "rope_parameters": scaling}).encode()
    line = b"1,1.5,2,2.5,3,3.5,4,4.5\n"
    return {
        "factors": Reader("f.json", _factors, factors),
        "applied": Reader("f.json", _applied, factors),
        "plan": Reader("p.toml", _plan, plans),
        "text": Reader("t.txt", _texts, (b"once upon a time",)),
        "jsonl": Reader("t.jsonl", _texts, (rows,)),
        "parquet": Reader("t.parquet", _texts, (table,)),
        "config": Reader("config.json", _config, (config,)),
        "csv": Reader("f.csv", _imported, (line, 2 * line, line.replace(b",", b"\n"))),
        "gguf": Reader("f.gguf", _imported, (_gguf(),)),
        "patch": Reader("f.json", _imported, (patch,)),
        "weights": Reader("model.safetensors", _weights, (save({"a": torch.ones(2, 3), "b": torch.zeros(4)}),)),
    }
