"""``longrope evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
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
    RayAddress,
    Remote,
    SlidingWindow,
    StreamWeights,
    TextColumn,
    Threads,
    TimeLimit,
    Workers,
    model_path,
    model_request,
    open_console,
    pool_request,
    print_json,
    with_text_keys,
)
from searcher.errors import LongRopeError


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
    time_limit: TimeLimit = None,
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
    options = locals()
    from commands.evaluations import EvaluationRequest
    from commands.evaluations import evaluate as run_evaluation
    from searcher.plan import parse_length
    from storage.factor_file import read
    from storage.report import evaluation_tables
    from workers.model import read_original_length

    measures = tuple(part.strip() for part in measure.split(","))
    if model is not None and not data and set(measures) & {"perplexity", "sliding", "title"}:
        raise LongRopeError("Name text for your model with --data: a file, a folder, a glob, JSONL or parquet.")
    path = model_path(model)
    trained = original_length or read_original_length(path, trust_remote_code)
    wanted = tuple(sorted({parse_length(part.strip(), trained) for part in lengths.split(",")}))
    file = read(factors) if factors is not None else None
    request = EvaluationRequest(
        model=model_request(options, path, wanted[-1]),
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
    pool = pool_request(options)
    found = run_evaluation(request, file, pool, open_console(stderr=True))
    if as_json:
        print_json(with_text_keys(found))
        return
    console = open_console()
    for shown in evaluation_tables(found):
        console.print(shown, highlight=False)
