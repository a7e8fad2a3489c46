"""Every export read by the program it is for, and the largest difference from our own: the table of docs/exports.md.

    python benchmarks/consumers.py --consumers FOLDER

FOLDER/NAME holds what the program NAME needs beyond this environment; results stand in results/consumers, a file a
form, and --only checks some forms anew. The folders are made with

    pip install --no-deps --target FOLDER/transformers4 'transformers==4.57.*' 'huggingface_hub<1' 'tokenizers<0.23'
    pip install --no-deps --target FOLDER/mlx 'mlx[cpu]' mlx-cpu mlx-lm sentencepiece
    pip install --no-deps --target FOLDER/onnx-genai onnxruntime-genai onnxruntime onnx onnx_ir ml_dtypes flatbuffers
    pip download --no-deps vllm sglang exllamav2 exllamav3     # and each wheel unpacked into FOLDER/NAME

Programs that run a model here run the reference model (ONNX Runtime GenAI, which takes the Phi family alone, a small
random phi3). Those that need a GPU have their own code for reading the config and for rotating run instead, by the
scripts in consumer_probes. Compared are log-probabilities of the next token over the whole vocabulary, or queries
after rotation, below, at and beyond the original length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from searcher.baselines import BASELINES  # noqa: E402
from searcher.rope import Factors, angles, attention_factor  # noqa: E402
from storage.config_forms import FORMS, config_patch, form_room  # noqa: E402
from storage.factor_csv import CSV, to_csv  # noqa: E402
from storage.factor_file import FactorFile, ModelIdentity, Regime, write  # noqa: E402
from storage.gguf_convert import convert_llama  # noqa: E402
from storage.gguf_file import LLAMA_CPP, patch_gguf  # noqa: E402
from storage.losses import EACH, Taken, take  # noqa: E402
from storage.model_folder import read_config, write_model_folder  # noqa: E402
from workers.model import model_digest  # noqa: E402
from workers.reference import MODEL_DIR, held_out_documents  # noqa: E402

ORIGINAL, TARGET = 256, 2048
LENGTHS = (200, 256, 257, 2000)
STARTS = (256, 512, 1024, 2047)  # that a user may start a program for, below the target
RUN, CODE = "runs the model", "its own config reader and rotation run"
READER = "its own config reader run, and the rotation by the formula"
FORMS_CHECKED = "transformers transformers4 vllm sglang gguf mlx exllamav2 exllamav3 onnx-genai csv"
CHECKED = FORMS_CHECKED.split(" ")
RESULTS = ROOT / "benchmarks" / "results" / "consumers"
BEGIN, END = "<!-- made by benchmarks/consumers.py -->", "<!-- end -->"


Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes
    ----------
    difference: the largest, from our own; None where the program is not here.
    untouched: the largest between our own and the model without factors, at the same places.
    """

    consumer: str
    form: str
    lists: str
    how: str
    compared: str
    difference: float | None
    untouched: float | None
    remark: str = ""


def identity(folder: Path, family: str, layers: int, rotary_dim: int) -> ModelIdentity:
    return ModelIdentity(family, model_digest(folder), family, 10000.0, rotary_dim, ORIGINAL, layers, "half-split")


def factor_file(model: ModelIdentity, switches: bool, short_attention: bool) -> FactorFile:
    """YaRN's factors at 8 times the window; with a set of its own up to the window, if it is to switch."""
    su = attention_factor("su", model.spec, TARGET / ORIGINAL)
    long = Factors(BASELINES["yarn"](model.spec, TARGET / ORIGINAL).lambdas, 0, su)
    regimes = [Regime(1, TARGET, long, "su")]
    if switches:
        low = Factors(BASELINES["yarn"](model.spec, 2.0).lambdas, 0, 1.05 if short_attention else su)
        regimes = [Regime(1, ORIGINAL, low, "none"), Regime(ORIGINAL + 1, TARGET, long, "su")]
    return FactorFile(model, tuple(regimes), {"study": None, "seed": None, "data": {}, "software": {}})


def ours(folder: Path, file: FactorFile | None, ids: list[int], lengths: list[int]) -> dict[int, Array]:
    """Our own log-probabilities of the token after the first ``length``, for each length."""
    import torch
    from transformers import AutoModelForCausalLM

    from workers.apply import apply_factors

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if file is not None:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place) / "factors.json", file)
            apply_factors(model, Path(place) / "factors.json")
    found = {}
    with torch.inference_mode():
        for length in lengths:
            logits = model(torch.tensor([ids[:length]])).logits[0, -1].double()
            found[length] = torch.log_softmax(logits, -1).numpy()
    return found


def rotated(file: FactorFile | None, model: ModelIdentity, length: int, seed: int = 0) -> Array:
    """Random queries, (length, d), after our own rotation."""
    queries = np.random.default_rng(seed).standard_normal((length, model.rotary_dim))
    factors = Factors((1.0,) * model.spec.pairs)
    if file is not None:
        factors = next(regime.factors for regime in file.regimes if length <= regime.max_length)
    turned = angles(model.spec, factors, np.arange(length))
    cos, sin = np.cos(turned) * factors.attention_factor, np.sin(turned) * factors.attention_factor
    first, second = np.split(queries, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def probe(name: str, consumers: Path, **request: Any) -> Any:
    """What a script of consumer_probes answers, in a process with the consumer's folder in front."""
    script = ROOT / "benchmarks" / "consumer_probes" / f"{name.replace('-', '_')}.py"
    folder = consumers / name
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRANSFORMERS_VERBOSITY": "error", "CONSUMER": str(folder)}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "answer.npz"
        command = [sys.executable, str(script), str(out)]
        done = subprocess.run(
            command, input=json.dumps(request), env=environment, cwd=place, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        with np.load(out) as answer:
            return dict(answer)


def exported(form: str, file: FactorFile, folder: Path, out: Path) -> Taken:
    """A model folder in a form."""
    taken = take(file, form_room(form, file.model.family))
    write_model_folder(folder, out, config_patch(form, taken, read_config(folder)), taken.target_length)
    return taken


def run_model(name: str, consumers: Path, folder: Path, model: ModelIdentity, ids: list[int]) -> list[Row]:
    """A program that loads a model folder and runs it."""
    rows = []
    room = FORMS[name].room
    for switches in (False, True) if room.short else (False,):
        file = factor_file(model, switches, room.attention == EACH)
        with tempfile.TemporaryDirectory() as place:
            exported(name, file, folder, Path(place) / "model")
            answer = probe(name, consumers, model=str(Path(place) / "model"), ids=ids, lengths=LENGTHS)
        rows.append(compared(FORMS[name].reads, name, answer, folder, file, ids))
    return rows


def compared(consumer: str, form: str, answer: dict[str, Any], folder: Path, file: FactorFile, ids: list[int]) -> Row:
    """The row of a program that ran the model."""
    lengths = sorted(int(length) for length in answer)
    expected, untouched = ours(folder, file, ids, lengths), ours(folder, None, ids, lengths)
    return Row(
        consumer,
        form,
        "short and long" if len(file.regimes) > 1 else "one",
        RUN,
        f"log-probabilities at {', '.join(map(str, lengths))} tokens",
        max(float(np.abs(answer[str(n)] - expected[n]).max()) for n in lengths),
        max(float(np.abs(untouched[n] - expected[n]).max()) for n in lengths),
    )


def run_llama_cpp(folder: Path, model: ModelIdentity, ids: list[int]) -> list[Row]:
    """llama.cpp takes short or long by its context, so each is run in its own; converted, then patched once more."""
    from importlib.metadata import version

    rows = []
    for switches in (False, True):
        file = factor_file(model, switches, False)
        taken = take(file, LLAMA_CPP)
        with tempfile.TemporaryDirectory() as place:
            converted, path = Path(place) / "converted.gguf", Path(place) / "model.gguf"
            convert_llama(folder, converted, taken)
            patch_gguf(converted, path, taken)
            answer: dict[str, Any] = {}
            for context in (ORIGINAL, TARGET):
                lengths = [length for length in LENGTHS if (length <= ORIGINAL) == (context == ORIGINAL)]
                # One more token than the context holds would be shifted out.
                lengths = [min(length, context - 2) for length in lengths]
                found = probe("gguf", Path(place), model=str(path), ids=ids, lengths=lengths, context=context)
                answer |= found
        rows.append(compared(f"llama.cpp (xllamacpp {version('xllamacpp')})", "gguf", answer, folder, file, ids))
    return rows


def run_rotation(name: str, consumers: Path, folder: Path, model: ModelIdentity) -> list[Row]:
    """A program whose models need a GPU: its own code reads the config and rotates, on the CPU."""
    rows, room = [], FORMS[name].room
    for switches in (False, True):
        file = factor_file(model, switches, room.attention == EACH)
        if switches and room.short_derived is not None:  # it takes 1 there
            low = file.regimes[0]
            low = Regime(low.min_length, low.max_length, Factors(low.factors.lambdas), "none")
            file = FactorFile(file.model, (low, file.regimes[1]), file.provenance)
        taken = take(file, form_room(name, model.family))
        config = read_config(folder)
        patch = config_patch(name, taken, config)
        with tempfile.TemporaryDirectory() as place:
            if FORMS[name].folder:
                write_model_folder(folder, Path(place) / "model", patch, TARGET)
            queries = {
                str(n): np.random.default_rng(0).standard_normal((n, model.rotary_dim)).tolist() for n in LENGTHS
            }
            answer = probe(
                name,
                consumers,
                model=str(Path(place) / "model" if FORMS[name].folder else folder),
                overrides=patch,
                queries=queries,
                original=ORIGINAL,
                switches=switches,
                target=TARGET,
                starts=STARTS,
            )
        apart = {n: float(np.abs(answer[str(n)] - rotated(file, model, n)).max()) for n in LENGTHS}
        untouched = max(float(np.abs(rotated(None, model, n) - rotated(file, model, n)).max()) for n in LENGTHS)
        remark, places = "", list(LENGTHS)
        if name == "sglang" and switches:
            places.remove(ORIGINAL + 1)
            remark = f"at {ORIGINAL + 1} tokens, where it takes the last for the first: {apart[ORIGINAL + 1]:.2g}"
        if name == "exllamav2":
            remark = started_for_less(model, answer)
        rows.append(
            Row(
                FORMS[name].reads,
                name,
                "short and long" if switches else "one",
                READER if name.startswith("exllama") else CODE,
                f"rotated queries of {', '.join(map(str, places))} tokens",
                max(apart[n] for n in places),
                untouched,
                remark,
            )
        )
    return rows


def started_for_less(model: ModelIdentity, answer: dict[str, Any]) -> str:
    """The attention factors of a program that takes them from the length it is started for, all of them as expected."""
    found = []
    for start in STARTS:
        expected = attention_factor("su", model.spec, start / ORIGINAL)
        if abs(float(answer[f"factor-{start}"]) - expected) > 1e-6:
            raise RuntimeError(
                f"started for {start} its attention factor is {answer[f'factor-{start}']}, not {expected}"
            )
        found.append(f"{expected:.4f} for {start}")
    return f"started for less than the target its attention factor is another: {', '.join(found)}"


def run_csv(model: ModelIdentity) -> list[Row]:
    """Read as the authors' code does, by numpy."""
    file = factor_file(model, False, False)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "factors.csv"
        path.write_text(to_csv(take(file, CSV).long, model.layers))
        read = np.loadtxt(path, delimiter=",")
    wanted = np.asarray([file.regimes[0].factors.lambdas] * model.layers)
    difference = float(np.abs(read - wanted).max())
    return [
        Row("numpy.loadtxt, as microsoft/LongRoPE", "csv", "by layer", "reads the file", "factors", difference, None)
    ]


def tiny_phi3(folder: Path) -> ModelIdentity:
    """A random phi3, small, with weights that make attention matter."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING["phi3"](
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, max_position_embeddings=ORIGINAL, original_max_position_embeddings=ORIGINAL,
        initializer_range=0.2, pad_token_id=0, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL_DIR / name).read_bytes())
    return identity(folder, "phi3", 2, 16)


def rows(consumers: Path, chosen: list[str]) -> list[Row]:
    from tokenizers import Tokenizer

    text = held_out_documents()["test"][0].read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")).encode(text).ids[: max(LENGTHS)]
    llama = identity(MODEL_DIR, "llama", 4, 64)
    found: list[Row] = []
    for name in chosen:
        try:
            if name == "csv":
                made = run_csv(llama)
            elif name == "gguf":
                made = run_llama_cpp(MODEL_DIR, llama, ids)
            elif name in ("vllm", "sglang", "exllamav2", "exllamav3"):
                made = run_rotation(name, consumers, MODEL_DIR, llama)
            elif name == "onnx-genai":
                with tempfile.TemporaryDirectory() as place:
                    made = run_model(name, consumers, Path(place), tiny_phi3(Path(place)), ids)
            else:
                made = run_model(name, consumers, MODEL_DIR, llama, ids)
        except (RuntimeError, ImportError) as error:
            print(f"{name} could not be checked here: {error}", file=sys.stderr)
            continue
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps([asdict(row) for row in made], indent=2)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        found += made
    return found


def table(found: list[Row]) -> str:
    lines = [
        "| consumer | form | lists | how it was checked | compared | largest difference | without factors |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        number = "-" if row.difference is None else f"{row.difference:.2g}" + (f"; {row.remark}" if row.remark else "")
        untouched = "-" if row.untouched is None else f"{row.untouched:.2g}"
        cells = (row.consumer, f"`{row.form}`", row.lists, row.how, row.compared, number, untouched)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--consumers", type=Path, default=Path("consumers"))
    parser.add_argument("--only", nargs="*", default=CHECKED)
    parser.add_argument("--docs", type=Path, help="put the table into this file, between its marks")
    given = parser.parse_args()
    rows(given.consumers.absolute(), given.only)
    paths = [RESULTS / f"{name}.json" for name in CHECKED]
    text = table([Row(**row) for path in paths if path.is_file() for row in json.loads(path.read_text())])
    print(text)
    if given.docs:
        page = given.docs.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        given.docs.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
