"""The command ``longrope``: parses, calls, prints. Heavy imports live inside the commands, so that help is instant."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from searcher.errors import LongRopeError

if TYPE_CHECKING:
    from extensions import Extension
    from runs import Run
    from storage.repository import Repository

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Search LongRoPE rescale factors: let a language model read further than it was trained to.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
studies_app = typer.Typer(invoke_without_command=True)
app.add_typer(studies_app, name="studies")

DEFAULT_STORAGE = "sqlite:///longrope.db"
# A study's name is part of a file's name and is typed after `longrope resume`.
STUDY_NAME = re.compile(r"\w[\w.+=@-]{0,59}")

Model = Annotated[str | None, typer.Option(help="Model folder or hub name; the reference model if not given.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Text: file, folder, glob, .jsonl, .parquet or a datasets name; may be given often."),
]
SelectionData = Annotated[list[str] | None, typer.Option(help="Text of the selection set, where you name the sets.")]
TestData = Annotated[list[str] | None, typer.Option(help="Text of the test set, where you name the sets.")]
TextColumn = Annotated[str, typer.Option(help="Column of JSONL and parquet that holds the text.")]
Storage = Annotated[str, typer.Option(envvar="LONGROPE_STORAGE", help="SQLAlchemy URL of the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Ray workers, each with the whole model; one a core or GPU if not given.")
]
GpusPerWorker = Annotated[
    float | None, typer.Option(min=0, help="GPUs of one worker; 0 runs on CPU; 1 if not given and there are any.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Join this Ray cluster instead of starting one here (resume: local goes back).")
]
InProcess = Annotated[bool, typer.Option("--in-process", help="Score in this process, without Ray: for debugging.")]
Out = Annotated[Path, typer.Option(help="Folder the factor file is written to.")]
Dtype = Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16 or float16.")]
Attention = Annotated[
    str, typer.Option(help="Attention kernel: auto (longrope, our own), sdpa, eager, flash_attention_2 or _3.")
]
SlidingWindow = Annotated[str | None, typer.Option(help="For windowed attention: keep, off or a number of tokens.")]
OriginalLength = Annotated[
    int | None, typer.Option(min=2, help="The trained window, where the config does not say it.")
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of a worker.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Chunk = Annotated[
    int | None, typer.Option(min=1, help="Tokens that go through a layer at one time; what fits if not given.")
]
HiddenOnHost = Annotated[bool, typer.Option("--hidden-on-host", help="Keep hidden states in host memory.")]
StreamWeights = Annotated[
    bool, typer.Option("--stream-weights", help="Keep the layers in host memory: for models larger than the card.")
]


@app.command()
def launch(
    model: Model = None,
    data: Data = None,
    target: Annotated[str, typer.Option(help="Target length: tokens, or 128k, 1M, 8x (times the window).")] = "8x",
    study: Annotated[str | None, typer.Option(help="Name of the study; made up if not given.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    preset: Annotated[
        str, typer.Option(help="refined (gradient and evolution), paper, paper-xl or quick (evolution alone).")
    ] = "refined",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all randomness of the study.")] = 0,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    in_process: InProcess = False,
    out: Out = Path(),
    selection_data: SelectionData = None,
    test_data: TestData = None,
    text_column: TextColumn = "text",
    data_seed: Annotated[int, typer.Option(min=0, help="Of the deal of documents into sets; --seed leaves it.")] = 0,
    search_documents: Annotated[int | None, typer.Option(min=1, help="Documents of the search set.")] = None,
    selection_documents: Annotated[int | None, typer.Option(min=1, help="Documents of the selection set.")] = None,
    test_documents: Annotated[int | None, typer.Option(min=1, help="Documents of the test set.")] = None,
    windows: Annotated[
        str | None, typer.Option(help="Windows of a document by set, such as search=1,refine=3,selection=2,test=4.")
    ] = None,
    population: Annotated[int | None, typer.Option(help="Individuals of the first generation.")] = None,
    parents: Annotated[int | None, typer.Option(help="Best individuals that children are made from.")] = None,
    mutants: Annotated[int | None, typer.Option(help="Mutants of a generation.")] = None,
    crosses: Annotated[int | None, typer.Option(help="Crosses of a generation.")] = None,
    generations: Annotated[int | None, typer.Option(help="Generations after the first.")] = None,
    mutation_probability: Annotated[float | None, typer.Option(help="Chance that a factor mutates.")] = None,
    mutation: Annotated[str | None, typer.Option(help="neighbours (the paper's), range or lognormal.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Propose by random, random-log, cmaes, tpe or nsga2 in evolution's place.")
    ] = None,
    refine_legs: Annotated[int | None, typer.Option(help="Legs of the seeds' gradient refinement; 0: none.")] = None,
    refine_final_legs: Annotated[int | None, typer.Option(help="Legs of the best individual's, at the end.")] = None,
    refine_steps: Annotated[int | None, typer.Option(help="Gradient steps of a leg.")] = None,
    refine_starts: Annotated[int | None, typer.Option(help="How many of the best seeds are refined.")] = None,
    refine_rate: Annotated[float | None, typer.Option(help="Size of the first step, in ln lambda.")] = None,
    learn_attention: Annotated[
        bool,
        typer.Option("--learn-attention", help="Refine the attention factor too; the start is --attention-factor."),
    ] = False,
    racing: Annotated[bool | None, typer.Option(help="Leave children that can hardly become parents any more.")] = None,
    racing_caution: Annotated[
        float | None, typer.Option(help="Deviations a child may do better than expected.")
    ] = None,
    critical_pair: Annotated[
        str | None, typer.Option(help="LongRoPE2's space: search from this pair on (auto or an index), NTK below.")
    ] = None,
    needles: Annotated[
        int, typer.Option(min=0, help="Score by this many planted needles a window alone, as LongRoPE2 does.")
    ] = 0,
    upper_ratio: Annotated[
        float | None,
        typer.Option(help="Upper bound of a factor, in units of the scale; 1.25, or 2 with a critical pair."),
    ] = None,
    n_hats: Annotated[str | None, typer.Option(help="Choices of n_hat, such as 0,4,16; 0 alone leaves it out.")] = None,
    attention_factor: Annotated[str, typer.Option(help="su, yarn, none or a number.")] = "su",
    seed_factors: Annotated[list[Path] | None, typer.Option(help="Factor file whose factors join the seeds.")] = None,
    finalists: Annotated[int | None, typer.Option(min=1, help="How many are re-scored on the selection set.")] = None,
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    sliding_window: SlidingWindow = None,
    original_length: OriginalLength = None,
    chunk: Chunk = None,
    hidden_on_host: HiddenOnHost = False,
    stream_weights: StreamWeights = False,
    threads: Threads = 1,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Start a search. All defaults: the reference model at 8 times its window, on text that is already here.

    Example: longrope launch --model ./my-model --data ./books --target 128k --gpus-per-worker 1
    """
    from runs import Run
    from searcher.plan import parse_choices, parse_length, settled
    from searcher.space import N_HATS
    from storage.repository import Repository
    from workers.corpus import CorpusRequest
    from workers.model import ModelRequest, read_original_length, resolve_folder
    from workers.reference import MODEL_DIR
    from workers.scorer import PoolRequest

    if model is not None and not data:
        raise LongRopeError("Name text for your model with --data: a file, a folder, a glob, JSONL or parquet.")
    _check_study_name(study)
    path = str(MODEL_DIR) if model is None else model
    resolve_folder(path)
    if Path(path).expanduser().is_dir():  # where resume finds it from any other folder; a hub's name stays one
        path = str(Path(path).expanduser().resolve())
    length = parse_length(target, original_length or read_original_length(path, trust_remote_code))
    choices = N_HATS if n_hats is None else parse_choices(n_hats)
    if n_hats is not None and max(choices) > length:
        raise LongRopeError(f"n_hat counts start tokens of the target's {length}, so it cannot be {max(choices)}.")
    settings = settled(
        preset,
        sampler,
        {
            "population": population,
            "parents": parents,
            "mutants": mutants,
            "crosses": crosses,
            "generations": generations,
            "probability": mutation_probability,
            "mutation": mutation,
        },
        {
            "legs": refine_legs,
            "final_legs": refine_final_legs,
            "steps": refine_steps,
            "starts": refine_starts,
            "rate": refine_rate,
            "attention": learn_attention or None,
        },
        racing,
        racing_caution,
        target_length=length,
        seed=seed,
        attention=attention_factor,
        upper_ratio=upper_ratio,
        n_hats=choices,
        finalists=finalists,
        seed_factors=_read_seed_factors(seed_factors or []),
        critical=critical_pair,
    )
    counts = {"search": search_documents, "selection": selection_documents, "test": test_documents}
    corpus = CorpusRequest(
        sources=tuple(data or ()),
        selection=tuple(selection_data or ()),
        test=tuple(test_data or ()),
        text_column=text_column,
        documents={part: count for part, count in counts.items() if count is not None},
        windows=_parse_windows(windows),
        seed=data_seed,
        needles=needles,
    )
    request = ModelRequest(
        path=path,
        target_length=length,
        dtype=dtype,
        attention=attention,
        sliding_window=sliding_window,
        original_length=original_length,
        chunk=chunk,
        hidden_on_host=hidden_on_host,
        stream_weights=stream_weights,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    repository = Repository(storage)
    study = _new_name(repository, study, f"{_plain(Path(path).name)}-{length}-seed{seed}")
    pool = None if in_process else PoolRequest(workers, gpus_per_worker, ray_address)
    _run(repository, Run(study, request, corpus, settings, pool, out), storage, as_json, is_new=True)


@app.command()
def extend(
    plan: Annotated[str, typer.Argument(help="Plan file (TOML), or the name of one that comes with the program.")] = (
        "reference"
    ),
    model: Model = None,
    data: Data = None,
    train_data: Annotated[
        list[str] | None, typer.Option(help="Text to fine-tune on; in none of the other sets.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; made up if not given.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of all randomness, in place of the plan's.")
    ] = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    in_process: InProcess = False,
    out: Out = Path(),
    selection_data: SelectionData = None,
    test_data: TestData = None,
    text_column: TextColumn = "text",
    data_seed: Annotated[int, typer.Option(min=0, help="Of the deal of documents into sets.")] = 0,
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    sliding_window: SlidingWindow = None,
    original_length: OriginalLength = None,
    chunk: Chunk = None,
    hidden_on_host: HiddenOnHost = False,
    stream_weights: StreamWeights = False,
    threads: Threads = 1,
    tuning_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a fine-tuning; all cores if not given.")
    ] = None,
    trust_remote_code: Remote = False,
    show: Annotated[bool, typer.Option("--show", help="Print the plan with what each stage costs, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a progressive extension: search, fine-tune, search on, recover short lengths, evaluate.

    All defaults: the reference model to 32 times its window. Plans that come with the program: longrope-llama2,
    longrope-mistral, reference, smoke.

    Example: longrope extend longrope-llama2 --model ./llama2 --data ./books --train-data ./redpajama
    """
    from extensions import Extension, show_plan
    from searcher.extension import FINETUNE
    from searcher.plan_file import read_plan
    from storage.repository import Repository
    from workers.corpus import CorpusRequest
    from workers.model import ModelRequest, read_original_length, resolve_folder
    from workers.reference import MODEL_DIR
    from workers.scorer import PoolRequest

    _check_study_name(study)
    path = str(MODEL_DIR) if model is None else model
    resolve_folder(path)
    if Path(path).expanduser().is_dir():  # where resume finds it from any other folder; a hub's name stays one
        path = str(Path(path).expanduser().resolve())
    stages = read_plan(plan, original_length or read_original_length(path, trust_remote_code), seed)
    if model is not None and not data and not show:
        raise LongRopeError("Name text for your model with --data: a file, a folder, a glob, JSONL or parquet.")
    tunes_here = any(not stage.outside for stage in stages.of_kind(FINETUNE))
    if model is not None and not train_data and tunes_here and not show:
        raise LongRopeError("The plan fine-tunes: name the text for it with --train-data.")
    request = ModelRequest(
        path=path,
        target_length=max(stage.length for stage in stages.stages),
        dtype=dtype,
        attention=attention,
        sliding_window=sliding_window,
        original_length=original_length,
        chunk=chunk,
        hidden_on_host=hidden_on_host,
        stream_weights=stream_weights,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    if show:
        show_plan(stages, request, _console())
        return
    corpus = CorpusRequest(
        sources=tuple(data or ()),
        selection=tuple(selection_data or ()),
        test=tuple(test_data or ()),
        text_column=text_column,
        seed=data_seed,
    )
    repository = Repository(storage)
    name = _new_name(repository, study, f"{_plain(Path(path).name)}-{_plain(stages.name)}")
    pool = None if in_process else PoolRequest(workers, gpus_per_worker, ray_address)
    cores = tuning_threads or os.cpu_count() or 1
    extension = Extension(name, stages, request, corpus, tuple(train_data or ()), cores, pool, out)
    _extend(repository, extension, storage, as_json, is_new=True)


@app.command()
def resume(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    in_process: InProcess = False,
    accept_numerics: Annotated[
        bool, typer.Option("--accept-numerics", help="Go on with other hardware or software, and lose bit-identity.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="What an outside trainer made, where an extension waits for it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder the factor file is written to; as launched if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a study after any interruption.

    Example: longrope resume my-study
    """
    from extensions import Extension
    from runs import Run
    from storage.repository import Repository
    from workers.scorer import PoolRequest

    repository = Repository(storage, create=False)
    record = repository.study(study)
    if record.status == "finished":
        raise LongRopeError(
            f"The study {study} is finished, so there is nothing to resume; `longrope export {study}` writes its "
            f"factors and `longrope studies show {study}` its tables."
        )
    extends = record.kind == "extension"
    if checkpoint is not None and not extends:
        raise LongRopeError(f"--checkpoint is for an extension that waits for one; {study} is a {record.kind}.")
    stored = (Extension if extends else Run).from_json(study, record.settings)
    if ray_address == "local":  # back from a cluster to this machine
        stored, ray_address = replace(stored, pool=PoolRequest(stored.pool.workers if stored.pool else None)), None
    given: dict[str, Any] = {"workers": workers, "gpus_per_worker": gpus_per_worker, "ray_address": ray_address}
    changed = {key: value for key, value in given.items() if value is not None}
    pool = replace(stored.pool or PoolRequest(), **changed) if changed or stored.pool else None
    run = replace(stored, pool=None if in_process else pool, out=out or stored.out)
    if isinstance(run, Extension):
        _extend(repository, run, storage, as_json, False, checkpoint, accept_numerics)
    else:
        _run(repository, run, storage, as_json, is_new=False, accept_numerics=accept_numerics)


def _parse_windows(text: str | None) -> dict[str, int]:
    from searcher.study import PARTS, REFINE

    windows = {}
    for item in text.split(",") if text else ():
        part, _, number = item.strip().partition("=")
        least = 0 if part == REFINE else 1  # a refinement without further windows descends on the search windows
        if part not in (*PARTS, REFINE) or not number.isdecimal() or int(number) < least:
            raise LongRopeError(f"--windows takes a number by set, such as search=1,selection=2,test=4, not {text!r}.")
        windows[part] = int(number)
    return windows


def _read_seed_factors(paths: list[Path]) -> dict[str, tuple[tuple[float, ...], int]]:
    from storage.factor_file import read

    seeds: dict[str, tuple[tuple[float, ...], int]] = {}
    for path in paths:
        for regime in read(path).regimes:
            if not regime.factors.shared:
                raise LongRopeError(f"{path} holds factors that differ by layer; seeds are one list for all layers.")
            name = f"{path.stem}_{regime.max_length}"
            if name in seeds:  # a file of the same name from another folder
                name = f"{name}_{len(seeds) + 1}"
            seeds[name] = (regime.factors.by_layer()[0], regime.factors.n_hat)
    return seeds


def _check_study_name(study: str | None) -> None:
    if study is not None and not STUDY_NAME.fullmatch(study):
        raise LongRopeError(
            "A study's name is part of its files' names: up to 60 letters, digits and any of . _ - + = @, the first of "
            f"them a letter or digit, not {study!r}."
        )


def _plain(name: str) -> str:
    """What of a model's or plan's name can be part of a study's."""
    return re.sub(r"[^\w.+=@-]+", "-", name).strip("-.")[:30] or "model"


def _new_name(repository: Repository, study: str | None, base: str) -> str:
    """The name asked for, where it is free, or one made from ``base``."""
    taken = {summary.name for summary in repository.studies()}
    if study is not None:
        if study in taken:
            raise LongRopeError(
                f"There is a study {study!r} already: `longrope resume {study}`, or choose another name."
            )
        return study
    names = [base, *(f"{base}-{n}" for n in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _run(
    repository: Repository, run: Run, storage: str, as_json: bool, is_new: bool, accept_numerics: bool = False
) -> None:
    from runs import run as run_study
    from storage.report import cost_line, pareto_table, perplexity_table
    from storage.results import perplexities

    console = _console(stderr=as_json)
    with _stoppable(repository, run.name, storage, console):
        finished = run_study(repository, run, console, is_new, accept_numerics)
    result = finished.result
    if not as_json:
        console.print(perplexity_table(result, "test"))
        console.print(f"chosen on the selection documents: {result['origin']}", highlight=False)
        if result["pareto"]:
            console.print(pareto_table(result))
        console.print(f"{cost_line(repository.cost(run.name))} {finished.seconds:.0f} s in all.", highlight=False)
        console.print(f"factors: {finished.factors}", highlight=False, soft_wrap=True)
        return
    tables = {part: perplexities(result, part) for part in result["scores"]}
    tables |= {f"{part}_at_study_attention": perplexities(result, part, True) for part in ("selection", "test")}
    _print_json(
        {
            "study": run.name,
            "factors": str(finished.factors),
            "target": run.model.target_length,
            "scale": result["scale"],
            **tables,
            "attention_factor": result["attention_factor"],
            "cost": result["forwards"],
            "gradients": result["gradients"],
            "seconds": round(finished.seconds, 3),
        }
    )


def _extend(
    repository: Repository,
    extension: Extension,
    storage: str,
    as_json: bool,
    is_new: bool,
    checkpoint: Path | None = None,
    accept_numerics: bool = False,
) -> None:
    from extensions import extend as run_extension
    from storage.report import cost_line, extension_table

    console = _console(stderr=as_json)
    with _stoppable(repository, extension.name, storage, console):
        extended = run_extension(repository, extension, console, is_new, checkpoint, accept_numerics)
    if as_json:
        shown = {key: value for key, value in asdict(extended).items() if key != "factors"}
        _print_json({"study": extension.name, "factors": extended.factors and str(extended.factors), **shown})
        return
    if extended.waits_for is not None:
        console.print(extended.waits_for, highlight=False, soft_wrap=True)
        return
    if extended.result is not None:
        for table in extension_table(extended.result):
            console.print(table)
    console.print(f"{cost_line(repository.cost(extension.name))} {extended.seconds:.0f} s in all.", highlight=False)
    console.print(f"factors: {extended.factors}", highlight=False, soft_wrap=True)


@contextmanager
def _stoppable(repository: Repository, study: str, storage: str, console: Console) -> Iterator[None]:
    """A block that Ctrl-C, and what a scheduler sends before it kills, stop cleanly, with the way to go on."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except KeyboardInterrupt:
        known = study in {summary.name for summary in repository.studies()}
        where = "" if storage == DEFAULT_STORAGE or "@" in storage else f" --storage {storage}"  # no password on screen
        again = f"what was computed is kept. Go on with: longrope resume {study}{where}"
        advice = again if known else "nothing had begun."
        console.print(f"\nStopped; {advice}", highlight=False)
        raise typer.Exit(130) from None


def _console(stderr: bool = False) -> Console:
    """A console that does not fold tables to 80 columns where nobody's terminal asks for it."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)


def _stop(signum: int, frame: object) -> None:  # noqa: ARG001 - the shape of a signal handler
    raise KeyboardInterrupt


def _print_json(value: object) -> None:
    """JSON has no infinity: a perplexity that overflowed is null."""

    def finite(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: finite(item) for key, item in inner.items()}
        if isinstance(inner, list):
            return [finite(item) for item in inner]
        return None if isinstance(inner, float) and not math.isfinite(inner) else inner

    print(json.dumps(finite(value), indent=2))


@app.command()
def evaluate(
    model: Model = None,
    data: Data = None,
    factors: Annotated[Path | None, typer.Option(help="Factor file to show beside the baselines.")] = None,
    lengths: Annotated[str, typer.Option(help="Lengths with commas between: 4096,128k or 1x,2x,8x.")] = "1x,2x,4x,8x",
    measure: Annotated[
        str,
        typer.Option(
            help="With commas between: perplexity, sliding (also by position, and with attention sinks), passkey, "
            "key_value, key_value_json, title."
        ),
    ] = "perplexity",
    windows: Annotated[int, typer.Option(min=1, help="Windows of a document, at most.")] = 2,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Of sliding windows; 256 tokens, below 2,048 an eighth, if not given.")
    ] = None,
    attention_factor: Annotated[
        str, typer.Option(help="What sliding shows all methods under, beside their own: su, yarn, none or a number.")
    ] = "su",
    sinks: Annotated[int, typer.Option(min=1, help="First tokens that window attention keeps.")] = 4,
    cache: Annotated[
        int | None, typer.Option(min=2, help="Tokens that window attention sees; the trained window if not given.")
    ] = None,
    paper_trials: Annotated[
        bool, typer.Option("--paper-trials", help="32 distances x 10 trials, as Position Interpolation does.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the retrieval trials.")] = 0,
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, commas between (extra).")] = None,
    reports: Annotated[
        Path | None, typer.Option(help="JSONL of document and summary, for ROUGE as of GovReport (extra).")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL of question, documents and answers, for question answering.")
    ] = None,
    text_column: TextColumn = "text",
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    in_process: InProcess = False,
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    sliding_window: SlidingWindow = None,
    original_length: OriginalLength = None,
    chunk: Chunk = None,
    hidden_on_host: HiddenOnHost = False,
    stream_weights: StreamWeights = False,
    threads: Threads = 1,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity and retrieval of a model at several lengths: the factors of a file beside every baseline.

    Without --data, the reference model's test documents. Example: longrope evaluate --factors my-study-factors.json
    """
    from evaluations import EvaluationRequest
    from evaluations import evaluate as run_evaluation
    from searcher.plan import parse_length
    from storage.factor_file import read
    from storage.report import evaluation_tables
    from workers.model import ModelRequest, read_original_length, resolve_folder
    from workers.reference import MODEL_DIR
    from workers.scorer import PoolRequest

    measures = tuple(part.strip() for part in measure.split(","))
    if model is not None and not data and set(measures) & {"perplexity", "sliding", "title"}:
        raise LongRopeError("Name text for your model with --data: a file, a folder, a glob, JSONL or parquet.")
    path = str(MODEL_DIR) if model is None else model
    resolve_folder(path)
    trained = original_length or read_original_length(path, trust_remote_code)
    wanted = tuple(sorted({parse_length(part.strip(), trained) for part in lengths.split(",")}))
    file = read(factors) if factors is not None else None
    model_request = ModelRequest(
        path=path,
        target_length=wanted[-1],
        dtype=dtype,
        attention=attention,
        sliding_window=sliding_window,
        original_length=original_length,
        chunk=chunk,
        hidden_on_host=hidden_on_host,
        stream_weights=stream_weights,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    request = EvaluationRequest(
        model=model_request,
        sources=tuple(data or ()),
        text_column=text_column,
        lengths=wanted,
        measures=measures,
        windows=windows,
        stride=stride,
        policy=attention_factor,
        sinks=sinks,
        cache=cache,
        paper=paper_trials,
        seed=seed,
        harness=tuple(task.strip() for task in harness.split(",")) if harness else (),
        reports=reports,
        questions=questions,
    )
    pool = None if in_process else PoolRequest(workers, gpus_per_worker, ray_address)
    found = run_evaluation(request, file, pool, _console(stderr=True))
    if as_json:
        _print_json(_with_text_keys(found))
        return
    console = _console()
    for shown in evaluation_tables(found):
        console.print(shown, highlight=False)


def _with_text_keys(value: Any) -> Any:
    """JSON's objects have keys of text alone; lengths are numbers here."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A finished study's name, or a factor file.")],
    to: Annotated[
        str, typer.Option(help="json, transformers-config (a patch) or transformers (a model folder).")
    ] = "json",
    out: Annotated[
        Path | None, typer.Option(help="File or folder to write; made up in this folder if not given.")
    ] = None,
    method: Annotated[str, typer.Option(help="searched, or a baseline of the study: yarn, ntk, pi, ...")] = "searched",
    model: Annotated[str | None, typer.Option(help="Model folder, where it is not the study's any more.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Write the factors of a study: the factor file, or what plain transformers loads.

    Example: longrope export my-study --to transformers --out ./my-model-128k
    """
    from runs import study_factor_file
    from storage.exports import exportable, transformers_folder, transformers_patch
    from storage.factor_file import from_json, read, write
    from workers.model import NO_WINDOW, model_digest, read_config_json, resolve_folder

    given = Path(source)
    if given.suffix == ".json" and given.is_file():
        if method != "searched":
            raise LongRopeError("--method takes a study's name before it; a factor file holds one method's factors.")
        name, file = given.stem.removesuffix("-factors"), read(given)
    else:
        from storage.repository import Repository

        name = source
        record = Repository(storage, create=False).study(name)
        if record.result is None:
            raise LongRopeError(f"The study {name} is not finished; go on with `longrope resume {name}`, then export.")
        if record.kind == "extension":
            if method != "searched":
                raise LongRopeError("An extension has one factor file; --method is for a search.")
            file = from_json(record.result["factors"])
            model = model or str(Path(record.settings["out"]) / record.result["model"])
        else:
            file = study_factor_file(name, record.settings, record.result, method)
            model = model or record.settings["model"]["path"]
    stem = name if method == "searched" else f"{name}-{method}"
    regime = file.regimes[-1]
    if to == "json":
        target = out or Path(f"{stem}-factors.json")
        write(target, file)
        notes: list[str] = []
    elif to in ("transformers", "transformers-config"):
        if model is None:
            raise LongRopeError("A factor file does not hold the model; name its folder with --model.")
        folder = resolve_folder(model)
        if file.model.weights_sha256 not in (model_digest(folder), model_digest(folder, trust_remote_code=True)):
            raise LongRopeError(f"{model} is not the model these factors were searched on ({file.model.name}).")
        config = read_config_json(folder)
        numerics: Any = file.provenance.get("numerics") or {}
        window, dtype = numerics.get("sliding_window"), numerics.get("dtype")
        if window is None and config.get("sliding_window") is not None:
            window = NO_WINDOW  # it was off, or never reached
        if to == "transformers":
            target = out or Path(f"{stem}-transformers")
            notes = transformers_folder(file, regime, folder, target, window, dtype).lines()
        else:
            target = out or Path(f"{stem}-config-patch.json")
            taken = exportable(regime)
            patch = transformers_patch(file.model, taken.factors, regime.max_length, config, window, dtype)
            _write_text(target, json.dumps(patch, indent=2) + "\n")
            notes = taken.lines()
        if len(file.regimes) > 1:
            notes.append(
                f"One regime is taken, up to {regime.max_length} tokens; {len(file.regimes) - 1} are left out."
            )
    else:
        raise LongRopeError(f"--to is json, transformers-config or transformers, not {to!r}.")
    if as_json:
        _print_json({"written": str(target), "form": to, "notes": notes})
        return
    console = _console()
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"written: {target}", highlight=False, soft_wrap=True)


def _write_text(path: Path, text: str) -> None:
    """In one step: the file is there whole, or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LongRopeError(f"{path} cannot be written: {error.strerror}.") from error


@studies_app.callback()
def studies(context: typer.Context, storage: Storage = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List studies, show one, delete one.

    Example: longrope studies show my-study
    """
    if context.invoked_subcommand is not None:
        for parameter, option in (("storage", "--storage"), ("as_json", "--json")):
            source = context.get_parameter_source(parameter)
            if source is not None and source.name == "COMMANDLINE":  # it would not reach the subcommand
                command = f"longrope studies {context.invoked_subcommand} STUDY {option}"
                raise LongRopeError(f"{option} belongs after the subcommand, as in `{command}`.")
        return
    from storage.report import studies_table
    from storage.repository import Repository

    summaries = Repository(storage, create=False).studies()
    if as_json:
        _print_json([_dated(asdict(summary), "created_at", "updated_at") for summary in summaries])
    elif summaries:
        _console().print(studies_table(summaries))
    else:
        _console().print("No studies in this store yet; `longrope launch` starts one.", highlight=False)


def _dated(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """The row with its moments as text."""
    return row | {name: None if row[name] is None else str(row[name]) for name in names}


@studies_app.command("show")
def show_study(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Settings, progress and results of one study.

    Example: longrope studies show my-study --json
    """
    from storage.report import extension_table, pareto_table, perplexity_table, progress_table, stages_table
    from storage.repository import Repository

    repository = Repository(storage, create=False)
    record = repository.study(study)
    rows, stages = repository.generations(study), repository.stages(study)
    logs = {stage.stage: repository.training_log(study, stage.stage) for stage in stages if stage.kind == "finetune"}
    if as_json:
        shown = {key: value for key, value in asdict(record).items() if key not in ("created_at", "updated_at")}
        _print_json(
            {
                **shown,
                "candidates": len(rows),
                "cost": asdict(repository.cost(study)),
                "stages": [_dated(asdict(stage), "started_at", "finished_at") for stage in stages],
                "training": _with_text_keys(logs),
                "failures": [row.failure for row in rows if row.failure],
            }
        )
        return
    console = _console()
    console.print(f"{study}: {record.status}, {record.settings['model']['path']}", highlight=False, soft_wrap=True)
    if stages:
        console.print(stages_table(stages, logs))
        for table in extension_table((record.result or {}).get("evaluation") or {"lengths": [], "rows": {}}):
            console.print(table)
    console.print(progress_table(rows, repository.cost(study)))
    if record.result is not None and not stages:
        for part in record.result["scores"]:
            console.print(perplexity_table(record.result, part))
        if record.result.get("pareto"):
            console.print(pareto_table(record.result))


@studies_app.command("delete")
def delete_study(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a study and every evaluation that no other study uses.

    Results that nobody asked for go too, unless another study is running: it may want them next.

    Example: longrope studies delete my-study --yes
    """
    from storage.repository import Repository

    repository = Repository(storage, create=False)
    record = repository.study(study)
    if not yes:
        typer.confirm(f"Delete the study {study} and what it computed?", abort=True)
    repository.delete_study(study)
    if record.kind == "extension":
        folder = Path(record.settings["out"]) / study
        _console().print(f"The models it tuned stay in {folder}.", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except LongRopeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # above all a standard output that takes no more
        print(f"Error: Reading or writing failed: {error}; free space or mend the access, then go on.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
