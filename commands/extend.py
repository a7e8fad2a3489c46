"""``longrope extend``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    from commands.extensions import Extension
    from storage.repository import Repository


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
    storage_timeout: StorageTimeout = DEFAULT_STORAGE_TIMEOUT,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of all randomness, in place of the plan's.")
    ] = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    time_limit: TimeLimit = None,
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
    options = locals()
    from commands.extensions import Extension, plan_costs
    from searcher.extension import FINETUNE
    from searcher.plan_file import read_plan
    from storage.report import plan_table
    from workers.corpus import CorpusRequest
    from workers.model import read_original_length

    check_study_name(study)
    path = model_path(model)
    stages = read_plan(plan, original_length or read_original_length(path, trust_remote_code), seed)
    if model is not None and not data and not show:
        raise LongRopeError("Name text for your model with --data: a file, a folder, a glob, JSONL or parquet.")
    tunes_here = any(not stage.outside for stage in stages.of_kind(FINETUNE))
    if model is not None and not train_data and tunes_here and not show:
        raise LongRopeError("The plan fine-tunes: name the text for it with --train-data.")
    request = model_request(options, path, max(stage.length for stage in stages.stages))
    if show:
        found = plan_costs(stages, request)
        if as_json:
            print_json({**stages.to_json(), "costs": [asdict(cost) for cost in found]})
        else:
            open_console().print(plan_table(stages, found))
        return
    corpus = CorpusRequest(
        sources=tuple(data or ()),
        selection=tuple(selection_data or ()),
        test=tuple(test_data or ()),
        text_column=text_column,
        seed=data_seed,
    )
    repository = driver_store(storage, storage_timeout)
    name = new_name(repository, study, f"{plain(Path(path).name)}-{plain(stages.name)}")
    pool = pool_request(options)
    cores = tuning_threads or os.cpu_count() or 1
    extension = Extension(name, stages, request, corpus, tuple(train_data or ()), cores, pool, out)
    run_extend(repository, extension, storage, as_json, is_new=True)


def run_extend(
    repository: Repository,
    extension: Extension,
    storage: str,
    as_json: bool,
    is_new: bool,
    checkpoint: Path | None = None,
    accept_numerics: bool = False,
) -> None:
    from commands.extensions import extend as run_extension
    from storage.report import cost_line, extension_table

    console = open_console(stderr=as_json)
    with stoppable(repository, extension.name, storage, console):
        extended = run_extension(repository, extension, console, is_new, checkpoint, accept_numerics)
    if as_json:
        shown = {key: value for key, value in asdict(extended).items() if key != "factors"}
        print_json({"study": extension.name, "factors": extended.factors and str(extended.factors), **shown})
        return
    if extended.waits_for is not None:
        console.print(extended.waits_for, highlight=False, soft_wrap=True)
        return
    if extended.result is not None:
        for table in extension_table(extended.result):
            console.print(table)
    console.print(f"{cost_line(repository.cost(extension.name))} {extended.seconds:.0f} s in all.", highlight=False)
    console.print(f"factors: {extended.factors}", highlight=False, soft_wrap=True)
    console.print(f"model they are for: {extended.model}", highlight=False, soft_wrap=True)
