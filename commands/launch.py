"""``longrope launch`` and ``longrope resume``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.extend import run_extend
from commands.options import (
    DEFAULT_STORAGE,
    DEFAULT_STORAGE_TIMEOUT,
    AsJson,
    Attention,
    Chunk,
    Data,
    Dtype,
    GpusPerWorker,
    HiddenOnHost,
    InProcess,
    Model,
    OriginalLength,
    Out,
    RayAddress,
    Remote,
    SelectionData,
    SlidingWindow,
    Storage,
    StorageTimeout,
    StreamWeights,
    TestData,
    TextColumn,
    Threads,
    TimeLimit,
    Workers,
    check_study_name,
    driver_store,
    model_path,
    model_request,
    new_name,
    open_console,
    plain,
    pool_request,
    print_json,
    stoppable,
)
from searcher.errors import LongRopeError

if TYPE_CHECKING:
    from commands.runs import Run
    from storage.repository import Repository


def launch(
    model: Model = None,
    data: Data = None,
    target: Annotated[str, typer.Option(help="Target length: tokens, or 128k, 1M, 8x (times the window).")] = "8x",
    study: Annotated[str | None, typer.Option(help="Name of the study; made up if not given.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    storage_timeout: StorageTimeout = DEFAULT_STORAGE_TIMEOUT,
    preset: Annotated[
        str, typer.Option(help="refined (gradient and evolution), paper, paper-xl or quick (evolution alone).")
    ] = "refined",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all randomness of the study.")] = 0,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    time_limit: TimeLimit = None,
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
    options = locals()
    from commands.runs import Run
    from searcher.plan import check_target, parse_choices, parse_length, settled
    from searcher.space import N_HATS
    from workers.corpus import CorpusRequest
    from workers.model import read_original_length

    if model is not None and not data:
        raise LongRopeError("Name text for your model with --data: a file, a folder, a glob, JSONL or parquet.")
    check_study_name(study)
    path = model_path(model)
    trained = original_length or read_original_length(path, trust_remote_code)
    length = parse_length(target, trained)
    check_target(length, trained)
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
    request = model_request(options, path, length)
    repository = driver_store(storage, storage_timeout)
    study = new_name(repository, study, f"{plain(Path(path).name)}-{length}-seed{seed}")
    pool = pool_request(options)
    _run(repository, Run(study, request, corpus, settings, pool, out), storage, as_json, is_new=True)


def resume(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    storage_timeout: StorageTimeout = DEFAULT_STORAGE_TIMEOUT,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    time_limit: TimeLimit = None,
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
    from commands.extensions import Extension
    from commands.runs import Run
    from workers.scorer import PoolRequest

    repository = driver_store(storage, storage_timeout, create=False)
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
    given["time_limit"] = time_limit
    changed = {key: value for key, value in given.items() if value is not None}
    pool = replace(stored.pool or PoolRequest(), **changed) if changed or stored.pool else None
    run = replace(stored, pool=None if in_process else pool, out=out or stored.out)
    if isinstance(run, Extension):
        run_extend(repository, run, storage, as_json, False, checkpoint, accept_numerics)
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


def _run(
    repository: Repository, run: Run, storage: str, as_json: bool, is_new: bool, accept_numerics: bool = False
) -> None:
    from commands.runs import run as run_study
    from storage.report import cost_line, pareto_table, perplexity_table
    from storage.results import perplexities

    console = open_console(stderr=as_json)
    with stoppable(repository, run.name, storage, console):
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
    print_json(
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
