"""Whatever a user gets wrong: one clear line, status 1 or 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from searcher.plan import PRESETS
from storage.repository import Repository
from tests.limits import files_no_larger_than

if TYPE_CHECKING:
    from conftest import Longrope

STORE = "longrope.db"
SECRET = "hunter2"
READ = "launch {small} --model {model}"
LAUNCH = f"{READ} --data {{text}}"


@dataclass(frozen=True)
class Bad:
    """A command line that cannot work, and what its one line must say."""

    command: str
    says: str
    status: int = 1


def usage(command: str, option: str) -> Bad:
    """A value that the parser itself refuses: more than a line, the option's name in it."""
    return Bad(command, f"Invalid value for '{option}'", 2)


MODELS = {
    "no such folder": Bad(f"{LAUNCH} --model nowhere", "There is no model folder nowhere; give a folder"),
    "an empty model name": Bad(f"{LAUNCH} --model ''", "holds no config.json"),
    "a hub name that is not there": Bad(f"{LAUNCH} --model no-such-organisation/no-such-model", "Hugging Face hub"),
    "a file for a folder": Bad(f"{LAUNCH} --model {{text}}/0.txt", "There is no model folder"),
    "no config": Bad(f"{LAUNCH} --model {{world}}/no-config", "holds no config.json"),
    "no safetensors": Bad(f"{LAUNCH} --model {{world}}/pickled", "{world}/pickled holds no .safetensors file"),
    "a config that is no JSON": Bad(f"{LAUNCH} --model {{world}}/broken-config", "is not a valid JSON file"),
    "a config that is a list": Bad(f"{LAUNCH} --model {{world}}/list-config", "Should have a `model_type`"),
    "a family that nobody knows": Bad(f"{LAUNCH} --model {{world}}/unknown-family", "model type `nonsense`"),
    "no tokenizer": Bad(f"{LAUNCH} --model {{world}}/no-tokenizer", "No tokenizer could be loaded from"),
    "weights cut off": Bad(f"{LAUNCH} --model {{world}}/cut-off", "cannot be loaded as a causal language model"),
    "NaN in the weights": Bad(
        f"{LAUNCH} --model {{world}}/nan", "up_proj.weight of {world}/nan holds values that are not"
    ),
    "a tensor missing": Bad(
        f"{LAUNCH} --model {{world}}/incomplete", "lacks 1 tensors of its architecture (model.layers.1"
    ),
    "weights of another size": Bad(
        f"{LAUNCH} --model {{world}}/other-size", "has shape (258, 64), but its config.json"
    ),
    "tokenizer of another model": Bad(f"{LAUNCH} --model {{world}}/small-vocabulary", "the model embeds only 60"),
    "GPT-2, no rotary embedding": Bad(f"{LAUNCH} --model {{world}}/gpt2", "has no rotary position embedding"),
    "code not allowed": Bad(f"{LAUNCH} --model {{world}}/own-code", "allow it with --trust-remote-code"),
    "attention window below the target": Bad(
        f"{LAUNCH} --model {{world}}/windowed", "attends to a window of 128 tokens, shorter than the target of 256"
    ),
    "model without data": Bad("launch --model {model}", "Name text for your model with --data"),
    "evaluate without data": Bad("evaluate --model {model}", "Name text for your model with --data"),
    "evaluate, broken weights": Bad(
        "evaluate --in-process --model {world}/nan --data {text} --lengths 1x", "holds values that are not finite"
    ),
}

LENGTHS = {
    "target below the window": Bad(
        f"{LAUNCH} --target 32", "The target of 32 tokens is not above the trained window of 64"
    ),
    "target at the window": Bad(f"{LAUNCH} --target 1x", "give a longer --target"),
    "target that is no whole number": Bad(
        f"{LAUNCH} --target 4.1x", "A length is a whole number of tokens such as 2048"
    ),
    "infinite target": Bad(f"{LAUNCH} --target inf", "A length is a whole number of tokens"),
    "target in words": Bad(f"{LAUNCH} --target long", "not 'long'"),
    "empty target": Bad(f"{LAUNCH} --target ''", "A length is a whole number"),
    "negative target": Bad(f"{LAUNCH} --target=-4x", "A length is a whole number"),
    "lengths with a gap": Bad("evaluate --model {model} --data {text} --lengths 1x,,2x", "A length is a whole number"),
    "lengths beyond the text": Bad(
        "evaluate --model {model} --data {text} --lengths 16x", "documents of at least 1024 tokens"
    ),
    "original length": usage(f"{LAUNCH} --original-length 1", "--original-length"),
}

TEXT = {
    "no such text": Bad(f"{READ} --data nowhere.txt", "There is no file or folder nowhere.txt"),
    "a glob without a match": Bad(f"{READ} --data '{{text}}/*.md'", "No file matches"),
    "documents too short": Bad(
        f"{LAUNCH} --target 16x", "5 documents of at least 1024 tokens are needed (search 2, selection 1"
    ),
    "too few documents": Bad(f"{LAUNCH} --test-documents 20", "but of 9 documents 9 are that long"),
    "empty text": Bad(f"{READ} --data {{world}}/empty.txt", "--data should name text, but there is none in"),
    "a folder without text": Bad(f"{READ} --data {{world}}/no-text", "should hold text, but no file in it ends in"),
    "binary text": Bad(f"{READ} --data {{world}}/binary.txt", "should be UTF-8 text but is not"),
    "JSONL without the column": Bad(f"{READ} --data {{world}}/rows.jsonl", "should have a column text but has body"),
    "JSONL with numbers": Bad(f"{READ} --data {{world}}/rows.jsonl --text-column id", "holds a int; name the column"),
    "JSONL that is none": Bad(f"{READ} --data {{world}}/broken.jsonl", "broken.jsonl:2 should be a JSON object"),
    "gzip cut off": Bad(f"{READ} --data {{world}}/cut-off.jsonl.gz", "cannot be read (Compressed file ended"),
    "parquet that is none": Bad(f"{READ} --data {{world}}/broken.parquet", "should be a parquet file"),
    "one document in two sets": Bad(
        f"{LAUNCH} --selection-data {{text}}/1.txt --test-data {{text}}/2.txt",
        "the text of 1.txt is in both search and",
    ),
    "two documents that begin alike": Bad(f"{READ} --data {{world}}/alike", "No two windows may be the same"),
    "a test set alone": Bad(f"{LAUNCH} --test-data {{text}}/2.txt", "Name both --selection-data and --test-data"),
    "sets without a search set": Bad(
        "launch --in-process --selection-data {text}/1.txt --test-data {text}/2.txt",
        "Name the search documents with --data",
    ),
}

SETTINGS = {
    "preset": Bad(f"{LAUNCH} --preset huge", f"The preset is one of {', '.join(PRESETS)}, not 'huge'"),
    "mutation": Bad(f"{LAUNCH} --mutation wild", "The mutation is one of neighbours, range, lognormal, not 'wild'"),
    "windows without a set": Bad(f"{LAUNCH} --windows 3", "--windows takes a number by set, such as search=1"),
    "windows of an unknown set": Bad(f"{LAUNCH} --windows train=3", "not 'train=3'"),
    "no windows": Bad(f"{LAUNCH} --windows search=0", "not 'search=0'"),
    "a digit that is no number": Bad(f"{LAUNCH} --windows search=²", "not 'search=²'"),
    "no windows to refine on in words": Bad(f"{LAUNCH} --windows refine=x", "not 'refine=x'"),
    "negative windows to refine on": Bad(f"{LAUNCH} --windows refine=-1", "not 'refine=-1'"),
    "n_hat in words": Bad(f"{LAUNCH} --n-hats none", "n_hat choices are whole numbers with commas between"),
    "no n_hat": Bad(f"{LAUNCH} --n-hats ''", "such as 0,4,16, not ''"),
    "negative n_hat": Bad(f"{LAUNCH} --n-hats=-1,0", "not negative"),
    "n_hat beyond the target": Bad(
        f"{LAUNCH} --n-hats 0,99999999999999999999", "n_hat counts start tokens of the target's 256"
    ),
    "negative population": Bad(f"{LAUNCH} --population=-1", "needs at least 1 in population, not -1"),
    "no parents": Bad(f"{LAUNCH} --parents 0", "needs at least 1 in parents, not 0"),
    "negative mutants": Bad(f"{LAUNCH} --mutants=-1", "The number of mutants cannot be negative"),
    "negative generations": Bad(f"{LAUNCH} --generations=-1", "The number of generations cannot be negative"),
    "probability 2": Bad(f"{LAUNCH} --mutation-probability 2", "The mutation probability lies in (0, 1], not at 2.0"),
    "probability NaN": Bad(f"{LAUNCH} --mutation-probability nan", "not at nan"),
    "upper ratio 0": Bad(f"{LAUNCH} --upper-ratio 0", "a positive number of times the scale, not 0.0"),
    "upper ratio below every factor": Bad(
        f"{LAUNCH} --upper-ratio 0.1", "must satisfy 0 < lower <= upper, not 1.0 and 0.4"
    ),
    "infinite upper ratio": Bad(f"{LAUNCH} --upper-ratio inf", "a positive number of times the scale, not inf"),
    "upper ratio NaN": Bad(f"{LAUNCH} --upper-ratio nan", "a positive number of times the scale, not nan"),
    "attention factor": Bad(
        f"{LAUNCH} --attention-factor big", "one of su, yarn, none or a positive number, not 'big'"
    ),
    "attention factor 0": Bad(f"{LAUNCH} --attention-factor 0", "positive number, not '0'"),
    "dtype": Bad(f"{LAUNCH} --dtype int8", "The dtype is auto, float32, bfloat16, float16, not 'int8'"),
    "attention kernel": Bad(f"{LAUNCH} --attention fast", "The attention kernel is one of auto, longrope, sdpa, eager"),
    "sliding window": Bad(f"{LAUNCH} --sliding-window wide", "--sliding-window takes keep, off or a number of tokens"),
    "output folder missing": Bad(f"{LAUNCH} --out nowhere", "--out must be a folder that exists; nowhere is none"),
    "threads 0": usage(f"{LAUNCH} --threads 0", "--threads"),
    "workers 0": usage(f"{LAUNCH} --workers 0", "--workers"),
    "negative GPUs": usage(f"{LAUNCH} --gpus-per-worker=-1", "--gpus-per-worker"),
    "negative seed": usage(f"{LAUNCH} --seed=-1", "--seed"),
    "a seed that no file holds": usage(f"{LAUNCH} --seed {10**40}", "--seed"),
    "no documents": usage(f"{LAUNCH} --search-documents 0", "--search-documents"),
    "no finalists": usage(f"{LAUNCH} --finalists 0", "--finalists"),
    "no windows to evaluate": usage("evaluate --model {model} --data {text} --windows 0", "--windows"),
    "a flag in words": usage("evaluate --model {model} --data {text} --threads many", "--threads"),
    "an option that is none": Bad(f"{LAUNCH} --modell x", "No such option: --modell", 2),
    "a command that is none": Bad("start", "No such command 'start'", 2),
    "no study named": Bad("resume", "Missing argument", 2),
}

REFINEMENT = {
    "no steps": Bad(f"{LAUNCH} --refine-steps 0", "A refinement needs at least 1 in steps, not 0"),
    "negative steps": Bad(f"{LAUNCH} --refine-steps=-5", "at least 1 in steps, not -5"),
    "negative legs": Bad(f"{LAUNCH} --refine-legs=-1", "at least 0 in legs, not -1"),
    "negative final legs": Bad(f"{LAUNCH} --refine-final-legs=-1", "at least 0 in final_legs, not -1"),
    "no starts": Bad(f"{LAUNCH} --refine-starts 0", "at least 1 in starts, not 0"),
    "rate 0": Bad(f"{LAUNCH} --refine-rate 0", "The rate of a refinement is a positive number, not 0.0"),
    "negative rate": Bad(f"{LAUNCH} --refine-rate=-0.1", "a positive number, not -0.1"),
    "infinite rate": Bad(f"{LAUNCH} --refine-rate inf", "a positive number, not inf"),
    "rate NaN": Bad(f"{LAUNCH} --refine-rate nan", "a positive number, not nan"),
    "half a leg": usage(f"{LAUNCH} --refine-legs 0.5", "--refine-legs"),
    "steps in words": usage(f"{LAUNCH} --refine-steps many", "--refine-steps"),
    "nothing that learns the attention factor": Bad(
        f"{LAUNCH} --learn-attention --refine-legs 0 --refine-final-legs 0",
        "are of a refinement, and this search has none; give --refine-legs",
    ),
    "a start of the attention factor": Bad(f"{LAUNCH} --learn-attention --attention-factor=-1", "positive number"),
}

SEARCHES = {
    "sampler": Bad(
        f"{LAUNCH} --sampler annealing", "The sampler is one of random, random-log, cmaes, tpe, nsga2, not 'annealing'"
    ),
    "empty sampler": Bad(f"{LAUNCH} --sampler ''", "The sampler is one of random"),
    "a sampler that is refined first": Bad(
        f"{LAUNCH} --sampler tpe --refine-legs 1", "set --refine-legs 0, and --refine-final-legs for the end"
    ),
    "a sampler that learns without an end": Bad(
        f"{LAUNCH} --sampler tpe --learn-attention --refine-final-legs 0", "with a sampler --refine-final-legs"
    ),
    "CMA-ES one by one": Bad(
        f"{LAUNCH} --sampler cmaes --mutants 1 --crosses 0", "The sampler cmaes needs at least 2 in batch, not 1"
    ),
    "NSGA-II one by one": Bad(
        f"{LAUNCH} --sampler nsga2 --mutants 1 --crosses 0", "The sampler nsga2 needs at least 3 in batch, not 1"
    ),
    "random search of nobody": Bad(
        f"{LAUNCH} --sampler random --mutants 0 --crosses 0", "The sampler random needs at least 1 in batch, not 0"
    ),
    "a sampler without end": Bad(f"{LAUNCH} --sampler tpe --generations 100000000", "more than 10000000 individuals"),
    "racing caution NaN": Bad(
        f"{LAUNCH} --racing-caution nan", "The caution of racing is a number of deviations, at least 0, not nan"
    ),
    "racing caution without racing": Bad(
        f"{LAUNCH} --no-racing", "--racing-caution is of racing, which --no-racing leaves out; give one of them"
    ),
    "negative racing caution": Bad(f"{LAUNCH} --racing-caution=-1", "at least 0, not -1.0"),
    "infinite racing caution": Bad(f"{LAUNCH} --racing-caution inf", "at least 0, not inf"),
    "racing in words": Bad(f"{LAUNCH} --racing=yes", "does not take a value", 2),
    "critical pair beyond the last": Bad(
        f"{LAUNCH} --critical-pair 8",
        "The critical pair is auto (3 for this model) or a whole number from 0 to 7, not '8'",
    ),
    "negative critical pair": Bad(f"{LAUNCH} --critical-pair=-1", "a whole number from 0 to 7, not '-1'"),
    "critical pair in words": Bad(f"{LAUNCH} --critical-pair first", "from 0 to 7, not 'first'"),
    "half a critical pair": Bad(f"{LAUNCH} --critical-pair 2.5", "from 0 to 7, not '2.5'"),
    "an upper bound below the critical pair's lower": Bad(
        f"{LAUNCH} --critical-pair 2 --upper-ratio 0.5", "must satisfy 0 < lower <= upper, not 4.0 and 2.0"
    ),
    "negative needles": usage(f"{LAUNCH} --needles=-1", "--needles"),
    "more needles than the window holds": Bad(
        f"{LAUNCH} --needles 50", "A window of 256 tokens has no room for needles and questions, 50 of each"
    ),
}

MEMORY = {
    "chunk 0": usage(f"{LAUNCH} --chunk 0", "--chunk"),
    "chunk in words": usage(f"{LAUNCH} --chunk all", "--chunk"),
    "chunk of a kernel that runs whole": Bad(
        f"{LAUNCH} --attention sdpa --chunk 64", "With sdpa attention the model runs whole, so chunk does not apply"
    ),
    "hidden states of a kernel that runs whole": Bad(
        f"{LAUNCH} --attention eager --hidden-on-host", "so hidden_on_host does not apply; leave it out"
    ),
    "weights of a kernel that runs whole": Bad(
        f"{LAUNCH} --attention eager --stream-weights", "so stream_weights does not apply; leave it out"
    ),
    "evaluate in chunks of 0": usage("evaluate --model {model} --data {text} --chunk 0", "--chunk"),
    "evaluate, a kernel that runs whole": Bad(
        "evaluate --in-process --model {model} --data {text} --lengths 1x --attention sdpa --stream-weights",
        "so stream_weights does not apply",
    ),
}

FACTORS = {
    "no such factor file": Bad(f"{LAUNCH} --seed-factors nowhere.json", "nowhere.json cannot be read: No such file"),
    "a folder for a factor file": Bad(f"{LAUNCH} --seed-factors {{text}}", "cannot be read: Is a directory"),
    "factor file, no JSON": Bad(f"{LAUNCH} --seed-factors {{world}}/cut-off.json", "is not valid JSON"),
    "factor file, field missing": Bad(
        f"{LAUNCH} --seed-factors {{world}}/missing.json", "regimes[0].n_hat: this field is missing"
    ),
    "factor file, wrong length": Bad(
        f"{LAUNCH} --seed-factors {{world}}/seven.json",
        "regimes[0].lambdas: expected 8 factors, half of model.rotary_dim",
    ),
    "factor file, NaN": Bad(
        f"{LAUNCH} --seed-factors {{world}}/nan.json",
        "regimes[0].lambdas[3]: expected a finite number above 0, found nan",
    ),
    "factor file, negative": Bad(f"{LAUNCH} --seed-factors {{world}}/negative.json", "above 0, found -1"),
    "factor file, zero": Bad(
        "export {world}/zero.json", "regimes[0].lambdas[3]: expected a finite number above 0, found 0"
    ),
    "seeds of another length": Bad(
        f"{LAUNCH} --seed-factors {{world}}/four-pairs.json",
        "'four-pairs_256' have 4 values; the model rotates 8 pairs",
    ),
    "seeds by layer": Bad(f"{LAUNCH} --seed-factors {{world}}/by-layer.json", "seeds are one list for all layers"),
    "evaluate, field missing": Bad(
        "evaluate --model {model} --data {text} --factors {world}/missing.json",
        "regimes[0].n_hat: this field is missing",
    ),
    "evaluate, another model's": Bad(
        "evaluate --in-process --model {model} --data {text} --factors {world}/four-pairs.json --lengths 2x",
        "The model rotates 8 pairs in 2 layers; the factors are 1 x 4",
    ),
}

NO_DRIVER = "needs the Python package psycopg" if importlib.util.find_spec("psycopg") is None else "cannot be opened"
STORES = {
    "store in no folder": Bad(f"{LAUNCH} --storage sqlite:///nowhere/x.db", "does not exist; create it first"),
    "store that is a folder": Bad(
        f"{LAUNCH} --storage sqlite:///{{text}}", "cannot be opened: unable to open database file"
    ),
    "store that is no database": Bad(f"{LAUNCH} --storage sqlite:///{{world}}/0.db", "file is not a database"),
    "store in memory": Bad(f"{LAUNCH} --storage sqlite://", "A store outlives its process: name a file"),
    "store that is no URL": Bad(
        f"{LAUNCH} --storage longrope.db", "Expected a database URL such as sqlite:///longrope.db"
    ),
    "store of no known kind": Bad(
        f"{LAUNCH} --storage oracel://me:{SECRET}@nowhere/x", "oracel://me:***@nowhere/x cannot be"
    ),
    "store out of reach": Bad(f"{LAUNCH} --storage postgresql://me:{SECRET}@nowhere.invalid/x", NO_DRIVER),
    "study name in use": Bad(f"{LAUNCH} --study done", "There is a study 'done' already: `longrope resume done`"),
    "study name with a slash": Bad(f"{LAUNCH} --study ../done", "A study's name is part of its files' names"),
    "empty study name": Bad(f"{LAUNCH} --study ''", "A study's name is part of its files' names"),
    "study name like an option": Bad(f"{LAUNCH} --study=-x", "the first of them a letter or digit, not '-x'"),
    "resume what is finished": Bad("resume done", "The study done is finished, so there is nothing to resume"),
    "resume what is not there": Bad("resume dona", "There is no study 'dona'; those nearest by are 'done'"),
    "resume without the output folder": Bad("resume halted --out nowhere", "--out must be a folder that exists"),
    "resume another model": Bad("resume other-model", "is not the one this study began with; put that one back"),
    "resume other documents": Bad("resume other-text", "The search documents are not those this study began with"),
    "resume without its model": Bad("resume no-model", "There is no model folder {world}/vanished"),
    "resume without a store": Bad(
        "resume done --storage sqlite:///none.db",
        "There is no store at sqlite:///none.db; `longrope launch` makes one.",
    ),
    "studies without a store": Bad("studies --storage sqlite:///none.db", "There is no store at sqlite:///none.db;"),
    "show without a store": Bad("studies show done --storage sqlite:///none.db", "There is no store at"),
    "delete without a store": Bad("studies delete done --yes --storage sqlite:///none.db", "There is no store at"),
    "export without a store": Bad("export done --storage sqlite:///none.db", "There is no store at"),
    "a store with nothing in it": Bad("studies --storage sqlite:///{world}/empty.txt", "file is not a database"),
    "show what is not there": Bad("studies show nothing", "There is no study 'nothing'"),
    "delete what is not there": Bad("studies delete nothing --yes", "There is no study 'nothing'"),
    "delete without a yes": Bad("studies delete done", "Aborted"),
    "option before the subcommand": Bad(
        "studies --storage sqlite:///x.db delete done --yes", "--storage belongs after"
    ),
    "flag before the subcommand": Bad("studies --json show done", "--json belongs after the subcommand"),
}

EXPORTS = {
    "export what is not there": Bad("export nothing", "There is no study 'nothing'"),
    "export what is not finished": Bad("export halted", "is not finished; go on with `longrope resume halted`"),
    "export to an unknown form": Bad(
        "export done --to onnx", "--to is json, csv, gguf, transformers, transformers4, mlx"
    ),
    "export an unknown method": Bad("export done --method best", "has no factors for 'best'; it has none, pi, ntk"),
    "export onto a folder with files": Bad(
        "export done --to transformers --out {text}", "is there already and is not an empty folder"
    ),
    "export into the model": Bad("export done --to transformers --out {model}/x", "lies in the model folder"),
    "export for another model": Bad(
        "export done --to transformers --model {world}/windowed",
        "is not the model these factors were searched on (tiny-llama)",
    ),
    "export a file of another model": Bad(
        "export {world}/four-pairs.json --to transformers --model {model}",
        "with rotary dimension 8, but config.json has 16",
    ),
    "export a file without its model": Bad(
        "export {world}/fine.json --to transformers", "name its folder with --model"
    ),
    "export a method of a file": Bad(
        "export {world}/fine.json --method yarn", "--method takes a study's name before it"
    ),
    "export into no folder": Bad("export done --out nowhere/x.json", "nowhere/x.json cannot be written: No such file"),
    "export a patch into no folder": Bad(
        "export done --method pi --to transformers-config --out nowhere/x.json", "nowhere/x.json cannot be written"
    ),
    "export onto a folder": Bad("export done --out {text}", "cannot be written: Is a directory"),
}

CASES = {
    **{**MODELS, **LENGTHS, **TEXT, **SETTINGS, **REFINEMENT, **SEARCHES, **MEMORY},
    **{**FACTORS, **STORES, **EXPORTS},
}


@pytest.fixture(scope="module")
def world(
    tiny_llama_folder: Path,
    small_study: list[str],
    longrope_in: Longrope,
    stop_after: Any,
    text_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Everything that is broken, and a store with studies that were finished, stopped, or bereft since."""
    folder = tmp_path_factory.mktemp("world")
    break_models(tiny_llama_folder, folder)
    break_texts(folder)
    shutil.copytree(tiny_llama_folder, folder / "vanished")
    shutil.copytree(tiny_llama_folder, folder / "changing")
    shutil.copytree(text_folder, folder / "edited")
    stopped = {
        "halted": [],
        "other-model": [f"--model={folder / 'changing'}"],
        "other-text": [f"--data={folder / 'edited'}"],
        "no-model": [f"--model={folder / 'vanished'}"],
    }
    assert longrope_in(folder, "launch", "--study=done", *small_study).status == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 0)
        for name, arguments in stopped.items():
            # Another seed, or the store would know everything already and the study would not stop.
            started = longrope_in(folder, "launch", f"--study={name}", *small_study, *arguments, "--seed=1")
            assert started.status == 130
    shutil.rmtree(folder / "vanished")
    shutil.copy(folder / "reseeded" / "model.safetensors", folder / "changing")
    for path in (folder / "edited").iterdir():
        path.write_text(path.read_text()[::-1])
    break_factors(folder / "done-factors.json", folder)
    with closing(sqlite3.connect(folder / STORE)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder


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
    (folder / "alike").mkdir()
    for number in range(9):
        (folder / "alike" / f"{number}.txt").write_text("once upon a time " * 20 + str(number))
    (folder / "0.db").write_text("once upon a time " * 100)


def break_factors(sound: Path, folder: Path) -> None:
    """One factor file a way to break it, and one that is fine."""
    shutil.copy(sound, folder / "fine.json")
    (folder / "cut-off.json").write_text(sound.read_text()[:300])

    def write(name: str, **changes: object) -> None:
        document = json.loads(sound.read_text())
        document["regimes"][0].pop("without_n_hat", None)
        document["regimes"][0] |= changes
        if name == "missing":
            del document["regimes"][0]["n_hat"]
        if name == "four-pairs":
            document["model"] |= {"rotary_dim": 8, "weights_sha256": "0" * 64}
        (folder / f"{name}.json").write_text(json.dumps(document))

    lambdas = [1.0, 1.1, 1.2, 1.3, 2.0, 3.0, 4.0, 5.0]
    write("missing")
    write("seven", lambdas=lambdas[:7])
    for name, value in (("nan", float("nan")), ("negative", -1), ("zero", 0)):
        write(name, lambdas=[*lambdas[:3], value, *lambdas[4:]])
    write("four-pairs", lambdas=lambdas[:4])
    write("by-layer", lambdas=[lambdas, lambdas])


def files(folder: Path) -> set[str]:
    """All but what SQLite keeps beside a database."""
    return {str(path) for path in folder.rglob("*") if not path.name.startswith(STORE)}


def kept(folder: Path) -> dict[str, list[Any]]:
    """What the store holds, but for who holds it."""
    with closing(sqlite3.connect(folder / STORE)) as connection:
        tables = {
            "longrope_studies": "name, kind, settings, profile, status, result",
            "longrope_candidates": "*",
            "longrope_units": "*",
            "longrope_evaluations": "*",
        }
        return {table: connection.execute(f"SELECT {rows} FROM {table}").fetchall() for table, rows in tables.items()}


class Place:
    """A folder with a copy of the store, where command lines are tried."""

    def __init__(self, folder: Path, world: Path, longrope: Longrope, names: dict[str, str]) -> None:
        self.folder = folder
        self.longrope = longrope
        self._names = names
        shutil.copy(world / STORE, folder / STORE)

    def arguments(self, command: str) -> list[str]:
        """As a shell would split it, with the names of what there is put in."""
        return shlex.split(command.format(**self._names))

    def refuses(self, bad: Bad) -> None:
        """One line that says it, and nothing left behind."""
        before = (files(self.folder), kept(self.folder))
        ended = self.longrope(*self.arguments(bad.command))
        says = bad.says.format(**self._names)
        assert ended.status == bad.status, ended
        assert says in ended.err
        assert "Traceback" not in ended.out + ended.err
        assert SECRET not in ended.out + ended.err
        assert (files(self.folder), kept(self.folder)) == before
        if bad.status == 1 and says != "Aborted":
            assert ended.out == ""
            assert ended.err.startswith("Error: ")
            assert len(ended.err.splitlines()) == 1
            assert ended.err.endswith("\n")


@pytest.fixture
def place(
    world: Path,
    longrope: Longrope,
    tiny_llama_folder: Path,
    text_folder: Path,
    small_study: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"model": tiny_llama_folder, "text": text_folder, "world": world}
    small = shlex.join(argument for argument in small_study if not argument.startswith(("--model", "--data")))
    return Place(tmp_path, world, longrope, {"small": small, **{name: str(path) for name, path in names.items()}})


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES.keys())
def test_bad_input(place: Place, bad: Bad) -> None:
    place.refuses(bad)


def test_an_upper_bound_beyond_all_numbers(place: Place) -> None:
    place.refuses(Bad(f"{LAUNCH} --upper-ratio 1e300", "upper"))


def test_a_study_that_is_held(place: Place) -> None:
    """By this very process, which lives."""
    repository = Repository(f"sqlite:///{place.folder / STORE}")
    with repository.open_study("halted"):
        for command in ("resume halted", "studies delete halted --yes"):
            place.refuses(Bad(command, f"'halted' is held by process {os.getpid()} on host"))
    repository.close()


def test_a_store_that_is_locked(place: Place) -> None:
    with closing(sqlite3.connect(place.folder / STORE, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        ended = place.longrope(*place.arguments(f"{LAUNCH} --storage 'sqlite:///{STORE}?timeout=0.2'"))
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(f"Error: The store sqlite:///{STORE} cannot be opened: database is locked.")
    assert len(ended.err.splitlines()) == 1


def test_a_library_without_the_reference_documents(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.reference.stdlib_dir", lambda: tmp_path / "stripped")
    place.refuses(Bad("launch --in-process", "name documents of your own with --data"))


class TestFullDisk:
    """The disk is really full: a file system of a few pages, where this user may mount one; else a limit on files."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "longrope-test", str(folder)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system is not allowed here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    @staticmethod
    def fill(disk: Path) -> Path:
        path = disk / "ballast"
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        return path

    def test_under_the_store(
        self,
        disk: Path,
        longrope_in: Longrope,
        small_study: list[str],
        process_environment: dict[str, str],
        tmp_path: Path,
    ) -> None:
        """In a process of its own: on a full disk it can free the study only by its end."""
        storage = f"--storage=sqlite:///{disk / STORE}"
        launched = in_process_of_its_own(
            process_environment, tmp_path, ["launch", "--study=full", *small_study, storage]
        )
        assert launched.returncode == 1
        assert len(launched.stderr.splitlines()) == 1
        assert launched.stderr.startswith(f"Error: The store sqlite:///{disk / STORE} failed: ")
        assert "free space or mend the access, then `longrope resume full`" in launched.stderr
        assert "generation 0/2" in launched.stdout
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert longrope_in(tmp_path, "resume", "full", storage).status == 0
        assert self.undisturbed(longrope_in, small_study, tmp_path) == (tmp_path / "full-factors.json").read_bytes()

    def test_under_the_factor_file(
        self, disk: Path, longrope_in: Longrope, longrope: Longrope, small_study: list[str], tmp_path: Path
    ) -> None:
        ballast = self.fill(disk)
        launched = longrope("launch", "--study=full", *small_study, f"--out={disk}")
        assert launched.status == 1
        assert (
            launched.err
            == f"Error: The factor file {disk}/full-factors.json cannot be written: No space left on device.\n"
        )
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        ballast.unlink()
        resumed = longrope("resume", "full")
        assert resumed.status == 0
        assert "\n0 evaluations computed" in resumed.out
        assert self.undisturbed(longrope_in, small_study, tmp_path) == (disk / "full-factors.json").read_bytes()

    def test_under_the_tokens(self, disk: Path, place: Place, tmp_path: Path) -> None:
        self.fill(disk)
        before = kept(tmp_path)
        ended = place.longrope(*place.arguments(LAUNCH), LONGROPE_CACHE=str(disk / "cache"))
        assert (ended.status, ended.out) == (1, "")
        assert len(ended.err.splitlines()) == 1
        assert "No space left on device); make room there, or set LONGROPE_CACHE to another folder." in ended.err
        assert kept(tmp_path) == before

    def test_under_an_export(self, disk: Path, place: Place) -> None:
        self.fill(disk)
        before = files(disk)
        export = "export done --method pi --out"
        for form in ("--to transformers", "--to transformers-config", "--to json"):
            ended = place.longrope(*place.arguments(f"{export} {disk / 'exported'} {form}"))
            assert (ended.status, ended.out) == (1, "")
            assert len(ended.err.splitlines()) == 1
            assert "exported cannot be written: No space left on device" in ended.err
            assert files(disk) == before

    @staticmethod
    def undisturbed(longrope_in: Longrope, small_study: list[str], tmp_path: Path) -> bytes:
        """The factor file of the same study where there is space."""
        folder = tmp_path / "undisturbed"
        folder.mkdir()
        assert longrope_in(folder, "launch", "--study=full", *small_study).status == 0
        return (folder / "full-factors.json").read_bytes()

    def test_as_a_limit_on_files(self, longrope: Longrope, small_study: list[str], tmp_path: Path) -> None:
        """What any user can try: no file may grow beyond 128 KiB, so the store meets EFBIG in the middle."""
        with files_no_larger_than(128 * 1024):
            launched = longrope("launch", "--study=full", *small_study)
        assert launched.status == 1
        assert len(launched.err.splitlines()) == 1
        assert launched.err.startswith(f"Error: The store sqlite:///{STORE} failed: ")
        assert longrope("resume", "full").status == 0
        assert (tmp_path / "full-factors.json").is_file()

    def test_under_standard_output(self, world: Path, process_environment: dict[str, str]) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        for arguments in (["studies"], ["studies", "show", "done", "--json"]):
            with Path("/dev/full").open("w") as full:
                ended = subprocess.run(
                    [sys.executable, "-m", "cli", *arguments],
                    env=process_environment,
                    cwd=world,
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                    check=False,
                )
            assert ended.returncode == 1
            assert len(ended.stderr.splitlines()) == 1
            assert ended.stderr.startswith("Error: Reading or writing failed: [Errno 28] No space left on device")


@pytest.mark.ray
def test_a_gpu_where_none_is(small_study: list[str], process_environment: dict[str, str], tmp_path: Path) -> None:
    """In a process of its own, with everything that libraries print by themselves."""
    arguments = [argument for argument in small_study if argument != "--in-process"]
    environment = {**process_environment, "CUDA_VISIBLE_DEVICES": ""}
    launch = ["launch", *arguments, "--gpus-per-worker=1", "--workers=1"]
    ended = in_process_of_its_own(environment, tmp_path, launch)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(
        "Error: 1 workers of 1 GPUs, 1 CPUs each were asked for, but the Ray cluster has 0 GPUs"
    )
    assert "lower --workers, --gpus-per-worker or --threads" in ended.stderr
    assert kept(tmp_path)["longrope_studies"] == []


def in_process_of_its_own(
    environment: dict[str, str], folder: Path, arguments: list[str]
) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(run, env=environment, cwd=folder, capture_output=True, text=True, check=False)
