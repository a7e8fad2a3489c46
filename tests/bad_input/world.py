"""Everything that is broken: models, text, factor files."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def break_models(sound: Path, folder: Path) -> None:
    """One folder a way to break a model."""
    from safetensors.torch import load_file, save_file
    from tiny_models import byte_tokenizer, write_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def copy(name: str) -> Path:
        return Path(shutil.copytree(sound, folder / name))

    def config(name: str, **changes: object) -> None:
        path = copy(name) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def weights(name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = copy(name) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    broken = "model.layers.1.mlp.up_proj.weight"
    (copy("no-config") / "config.json").unlink()
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (copy("broken-config") / "config.json").write_text('{"model_type": "llama", ')
    (copy("list-config") / "config.json").write_text("[]")
    for path in copy("no-tokenizer").glob("token*"):
        path.unlink()
    cut = copy("cut-off") / "model.safetensors"
    os.truncate(cut, cut.stat().st_size // 2)
    for name, header in {
        "long-header": (10 * 2**30).to_bytes(8, "little"),
        "vast-tensor": _header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "deep-header": _header({"w": {}})[:8] + b"[" * 9,
    }.items():
        (copy(name) / "model.safetensors").write_bytes(header)
    weights("nan", lambda tensors: tensors[broken][3, 5].fill_(float("nan")))
    weights("incomplete", lambda tensors: tensors.pop(broken))
    config("unknown-family", model_type="nonsense")
    config("other-size", hidden_size=32)
    places = {"AutoConfig": "configuration_mine.MineConfig"}
    config("own-code", model_type="mine", auto_map=places)
    (folder / "own-code" / "configuration_mine.py").write_text("raise SystemExit('this must not run')\n")
    write_model(folder / "small-vocabulary", "llama", vocab_size=60)
    write_model(folder / "windowed", "mistral", sliding_window=128)
    write_model(folder / "reseeded", "llama", seed=1)
    gpt2 = GPT2Config(vocab_size=258, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    byte_tokenizer().save_pretrained(folder / "gpt2")


def _header(tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def break_texts(folder: Path) -> None:
    """Text that cannot be read, or is none; a database that is none."""
    (folder / "empty.txt").write_text(" \n")
    (folder / "no-text").mkdir()
    (folder / "no-text" / "picture.png").write_bytes(b"\x89PNG")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (folder / "rows.jsonl").write_text('{"body": "once", "id": 1}\n')
    (folder / "broken.jsonl").write_text('{"text": "once"}\n{"text": \n')
    (folder / "cut-off.jsonl.gz").write_bytes(gzip.compress(b'{"text": "once"}\n')[:20])
    (folder / "broken.parquet").write_text("once upon a time")
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "lists.jsonl").write_text("[1]\n")
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "none.jsonl.gz").write_text('{"text": "once"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "numbers.parquet")
    sound = (folder / "numbers.parquet").read_bytes()
    (folder / "cut-off.parquet").write_bytes(sound[:-9] + sound[-8:])
    (folder / "alike").mkdir()
    for number in range(9):
        (folder / "alike" / f"{number}.txt").write_text("once upon a time " * 20 + str(number))
    (folder / "0.db").write_text("once upon a time " * 100)


def plain_factors(sound: Path, folder: Path) -> None:
    """A factor file with one list of factors, that rows of the table change."""
    document = json.loads(sound.read_text())
    document["regimes"][0].pop("without_n_hat", None)
    (folder / "fine.json").write_text(json.dumps(document))
