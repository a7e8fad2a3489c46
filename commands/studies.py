"""``longrope studies``: list, show, compare, delete."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.options import DEFAULT_STORAGE, AsJson, Storage, open_console, print_json, stem, with_text_keys
from searcher.errors import LongRopeError

studies_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@studies_app.callback()
def studies(context: typer.Context, storage: Storage = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List studies, show one, compare some, delete one.

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
        print_json([_dated(asdict(summary), "created_at", "updated_at") for summary in summaries])
    elif summaries:
        console = open_console()
        console.print(studies_table(summaries, console.width))
    else:
        open_console().print("No studies in this store yet; `longrope launch` starts one.", highlight=False)


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
        print_json(
            {
                **shown,
                "candidates": len(rows),
                "cost": asdict(repository.cost(study)),
                "stages": [_dated(asdict(stage), "started_at", "finished_at") for stage in stages],
                "training": with_text_keys(logs),
                "failures": [row.failure for row in rows if row.failure],
            }
        )
        return
    console = open_console()
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


@studies_app.command("compare")
def compare_studies(
    studies: Annotated[list[str], typer.Argument(help="Names of two studies or more, the one to compare with first.")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Studies of one store side by side: settings that differ, perplexities, cost, time, rescale factors.

    Example: longrope studies compare my-study my-study-quick
    """
    from storage.comparison import compare, comparison_tables
    from storage.repository import Repository

    found = compare(Repository(storage, create=False), studies)
    if as_json:
        print_json(found)
        return
    console = open_console()
    for shown in comparison_tables(found):
        console.print(shown, highlight=False)


@studies_app.command("delete")
def delete_study(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a study and every evaluation that no other study uses.

    Results that nobody asked for go too, unless another study is running: it may want them next.

    Example: longrope studies delete my-study --yes
    """
    from storage.repository import Repository

    repository = Repository(storage, create=False)
    record = repository.study(study)
    if not yes:
        typer.confirm(f"Delete the study {study} and what it computed?", abort=True, err=as_json)
    repository.delete_study(study)
    folder = Path(record.settings["out"]) / stem(study) if record.kind == "extension" else None
    if as_json:
        print_json({"deleted": study, "models": None if folder is None else str(folder)})
        return
    console = open_console()
    console.print(f"deleted: {study}", highlight=False, soft_wrap=True)
    if folder is not None:
        console.print(f"The models it tuned stay in {folder}.", highlight=False, soft_wrap=True)
