"""Factor files, stores, studies and exports that are not there, not whole or not meant."""

from __future__ import annotations

import importlib.util

from tests.bad_input.bad import LAUNCH, REMOVED, SECRET, Bad, factors, usage

NO_DRIVER = "needs the Python package psycopg" if importlib.util.find_spec("psycopg") is None else "cannot be opened"
FOUR_PAIRS = {"model.rotary_dim": 8, "model.weights_sha256": "1" * 64, "regimes.0.lambdas": [1.0, 1.1, 1.2, 1.3]}
BY_LAYER = {"regimes.0.lambdas": [[1.0] * 8, [1.0] * 8]}
EVALUATE = "evaluate --in-process --model {model} --data {text} --lengths 2x --factors factors.json"

FACTORS = {
    # what is no factor file
    "no such factor file": Bad(f"{LAUNCH} --seed-factors nowhere.json", "nowhere.json cannot be read: No such file"),
    "a folder for a factor file": Bad(f"{LAUNCH} --seed-factors {{text}}", "cannot be read: Is a directory"),
    "a device for a factor file": Bad(f"{LAUNCH} --seed-factors /dev/zero", "/dev/zero is larger than 8 MiB"),
    "factor file, no JSON": factors('{"format": "longrope-factors", ', "is not valid JSON: Expecting property name"),
    "factor file, binary": factors("\0\1", "is not valid JSON: Expecting value at line 1, column 1"),
    "factor file, nested without end": factors("[" * 100_000, "factors.json is nested too deeply to be a file of"),
    "factor file, a list": factors("[]", 'expected an object with "format": "longrope-factors"'),
    "factor file, another format": factors({"format": "lora"}, 'expected an object with "format"'),
    "factor file, a key twice": factors('{"format": 1, "format": 2}', "the key format comes twice in one object"),
    "factor file of later": factors({"version": 2}, "it has version 2 and this program reads up to 1; upgrade"),
    "factor file, a flag for a version": factors({"version": True}, "version: expected a whole number from 1"),
    # its fields
    "factor file, a field too many": factors({"regimes.0.nhat": 0}, "regimes[0].nhat: there is no such field, only"),
    "factor file, a field missing": factors({"regimes.0.n_hat": REMOVED}, "regimes[0].n_hat: this field is missing"),
    "factor file, no regimes": factors(
        {"regimes": []}, "regimes: expected a list that is not empty, found a list of 0"
    ),
    "factor file, regimes by name": factors(
        {"regimes": {"a": 1}}, "expected a list that is not empty, found an object"
    ),
    "factor file, half a token": factors({"regimes.0.max_length": 256.5}, "regimes[0].max_length: expected a whole"),
    "factor file, a regime backwards": factors({"regimes.0.max_length": 1, "regimes.0.min_length": 2}, "number from 2"),
    "factor file, a length beyond all": factors({"regimes.0.max_length": 10**40}, "to 9007199254740992, found 1e+40"),
    "factor file, negative n_hat": factors({"regimes.0.n_hat": -1}, "regimes[0].n_hat: expected a whole number from 0"),
    "factor file, wrong length": factors(
        {"regimes.0.lambdas": [1.0] * 7}, "expected 8 factors, half of model.rotary_d"
    ),
    "factor file, no factors": factors({"regimes.0.lambdas": []}, "lambdas: expected a list that is not empty"),
    "factor file, NaN": factors({"regimes.0.lambdas.3": float("nan")}, "lambdas[3]: expected a finite number above 0"),
    "factor file, infinity": factors({"regimes.0.lambdas.3": float("inf")}, "a finite number above 0, found inf"),
    "factor file, a huge whole number": factors(
        {"regimes.0.lambdas.3": 10**400}, "lambdas[3]: expected a finite number"
    ),
    "factor file, negative": factors(
        {"regimes.0.lambdas.3": -1}, "lambdas[3]: expected a finite number above 0, found -1"
    ),
    "factor file, a flag": factors(
        {"regimes.0.lambdas.3": True}, "lambdas[3]: expected a finite number above 0, found t"
    ),
    "factor file, text": factors({"regimes.0.lambdas.3": "4"}, 'a finite number above 0, found "4"'),
    "factor file, too few layers": factors(
        {"regimes.0.lambdas": [[1.0] * 8]}, "expected 2 lists, one for each of model"
    ),
    "factor file, no attention": factors(
        {"regimes.0.attention_factor": 0}, "attention_factor: expected a finite number"
    ),
    "factor file, policy": factors(
        {"regimes.0.attention_policy": "big"}, "su, yarn, none or a positive number as text"
    ),
    "factor file, digest": factors({"model.weights_sha256": "x"}, "model.weights_sha256: expected 64 lower-case hexad"),
    "factor file, odd rotary dimension": factors({"model.rotary_dim": 15}, "model.rotary_dim: expected an even number"),
    "factor file, base": factors({"model.theta": 1}, "model.theta: expected a finite number above 1, found 1"),
    "factor file, pairing": factors({"model.pairing": "both"}, "model.pairing: expected half-split or interleaved"),
    "factor file, seed": factors({"provenance.seed": 0.5}, "provenance.seed: expected a whole number or null"),
    "factor file, provenance": factors({"provenance.data": REMOVED}, "provenance.data: this field is missing"),
    "factor file, a key without end": factors({"a" * 10**6: 1}, "aaa...: there is no such field, only format, version"),
    "factor file, a key that clears the screen": factors({"\x1b[2J": 1}, r'"\u001b[2J": there is no such field, only'),
    # used where it does not fit
    "export of zero": Bad(
        "export factors.json", "lambdas[3]: expected a finite number", factors={"regimes.0.lambdas.3": 0}
    ),
    "seeds of another length": factors(FOUR_PAIRS, "'factors_256' have 4 values; the model rotates 8 pairs"),
    "seeds by layer": factors(BY_LAYER, "seeds are one list for all layers"),
    "evaluate, field missing": Bad(EVALUATE, "n_hat: this field is missing", factors={"regimes.0.n_hat": REMOVED}),
    "evaluate, another model's": Bad(EVALUATE, "8 pairs in 2 layers; the factors are 1 x 4", factors=FOUR_PAIRS),
}

STORES = {
    "store in no folder": Bad(f"{LAUNCH} --storage sqlite:///nowhere/x.db", "does not exist; create it first"),
    "store that is a folder": Bad(
        f"{LAUNCH} --storage sqlite:///{{text}}", "cannot be opened: unable to open database file"
    ),
    "store that is no database": Bad(f"{LAUNCH} --storage sqlite:///{{world}}/0.db", "file is not a database"),
    "store with a password, no database": Bad(
        f"{LAUNCH} --storage 'sqlite:///{{world}}/0.db?password={SECRET}'", "file is not a database"
    ),
    "store at a port in words": Bad(
        f"{LAUNCH} --storage postgresql://me:{SECRET}@host:port/x", "this one cannot be read"
    ),
    "no store named": Bad(f"{LAUNCH} --storage ''", "Expected a database URL such as sqlite:///longrope.db"),
    "store in memory": Bad(f"{LAUNCH} --storage sqlite://", "A store outlives its process: name a file"),
    "store that is no URL": Bad(
        f"{LAUNCH} --storage longrope.db", "Expected a database URL such as sqlite:///longrope.db"
    ),
    "store of no known kind": Bad(
        f"{LAUNCH} --storage oracel://me:{SECRET}@nowhere/x", "oracel://me:***@nowhere/x cannot be"
    ),
    "store out of reach": Bad(f"{LAUNCH} --storage postgresql://me:{SECRET}@nowhere.invalid/x", NO_DRIVER),
}

STUDIES = {
    "study name in use": Bad(
        f"{LAUNCH} --study done", "There is a study 'done' already: it is finished; choose another name."
    ),
    "study name with a slash": Bad(f"{LAUNCH} --study ../done", "A study's name is part of its files' names"),
    "empty study name": Bad(f"{LAUNCH} --study ''", "A study's name is part of its files' names"),
    "study name from the root": Bad(f"{LAUNCH} --study /tmp/x", "A study's name is part of its files' names"),
    "study name of a folder above": Bad(f"{LAUNCH} --study ..", "the first of them a letter or digit, not '..'"),
    "study name with a line's end": Bad(f"{LAUNCH} --study 'a\nb'", r"a letter or digit, not 'a\nb'"),
    "study name without end": Bad(f"{LAUNCH} --study {'a' * 61}", "up to 60 letters, digits and any of . _ - + = @"),
    "study name like an option": Bad(f"{LAUNCH} --study=-x", "the first of them a letter or digit, not '-x'"),
    "resume what is finished": Bad("resume done", "The study done is finished, so there is nothing to resume"),
    "resume what is not there": Bad("resume dona", "There is no study 'dona'; those nearest by are 'done'"),
    "resume without the output folder": Bad("resume halted --out nowhere", "--out must be a folder that exists"),
    "resume another model": Bad("resume other-model", "is not the one this study began with; put that one back"),
    "resume other documents": Bad("resume other-text", "The search documents are not those this study began with"),
    "resume without its model": Bad("resume no-model", "There is no model folder {world}/vanished"),
    "resume at a checkpoint": Bad("resume halted --checkpoint {model}", "is for an extension that waits for one"),
    "resume a path": Bad("resume ../done", "There is no study '../done'"),
    "resume at a name that clears the screen": Bad("resume '\x1b[2J'", r"There is no study '\x1b[2J'"),
    "resume, half a worker": usage("resume halted --workers 0.5", "--workers"),
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
        "export factors.json --to transformers --model {model}",
        "is not the model these factors were searched on",
        factors=FOUR_PAIRS,
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
    "export onto another file": Bad("export done --out {text}/0.txt", "0.txt is there already: give --overwrite"),
    "export a GGUF onto another file": Bad(
        "export done --to gguf --accept-loss n_hat --out {text}/0.txt", "0.txt is there already: give --overwrite"
    ),
    "export onto the store": Bad(
        "export done --out longrope.db --overwrite", "longrope.db is a database; name another file with --out"
    ),
    "report onto the store": Bad("report done --out longrope.db --overwrite", "longrope.db is a database"),
    "export onto what is exported": Bad(
        "export factors.json --to csv --out factors.json --overwrite",
        "factors.json is the factor file that is exported",
        factors={"provenance.seed": 1},
    ),
    "export a CSV onto another file": Bad(
        "export done --to csv --accept-loss n_hat --out {text}/0.txt", "0.txt is there already: give --overwrite"
    ),
    "export a patch onto another file": Bad(
        "export done --to vllm --accept-loss n_hat --out {text}/0.txt", "0.txt is there already: give --overwrite"
    ),
    "report onto another file": Bad("report done --out {text}/0.txt", "0.txt is there already: give --overwrite"),
    "export a file of another kind": Bad(
        "export {text}/0.txt", "0.txt is no factor file, which end in .json. Taken for"
    ),
    "export a file that is not there": Bad("export f.json", "f.json is not there. Taken for a study: There is"),
    "export to nothing": Bad("export done --to ''", "--to is json, csv, gguf"),
    "export the empty name": Bad("export ''", "There is no study ''"),
    "export a broken file": Bad("export factors.json", "is not valid JSON", factors="{{"),
    "export onto a folder": Bad("export done --out {text}", "cannot be written: Is a directory"),
}
