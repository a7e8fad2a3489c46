"""``longrope report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    DEFAULT_STORAGE,
    AsJson,
    Overwrite,
    Storage,
    open_console,
    print_json,
    refuse_to_replace,
    stem,
    write_text,
)


def report(
    study: Annotated[str, typer.Argument(help="Name of the study: running, stopped or finished.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; STUDY-report.html in this folder if not given.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="What `longrope evaluate --json` printed, to be shown too; may be given often."),
    ] = None,
    overwrite: Overwrite = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Write a study as one HTML page: no network, no script; light or dark, on a phone too.

    Example: longrope report my-study --out my-study.html
    """
    from commands.reproduce import again
    from storage.measured import read_evaluation
    from storage.page import is_page, render
    from storage.page_data import gather
    from storage.repository import Repository

    measured = [read_evaluation(path) for path in evaluation or []]
    repository = Repository(storage, create=False)
    how = again(repository.study(study))
    data = gather(repository, study, measured, how.commands, how.remarks, how.plan_file)
    path = out or Path(f"{stem(study)}-report.html")
    if not is_page(path, study):  # an earlier report may be replaced
        refuse_to_replace(path, overwrite)
    page = render(data)
    write_text(path, page)
    if as_json:
        print_json(
            {"study": study, "written": str(path), "status": data.record.status, "figures": page.count("<figure")}
        )
        return
    open_console().print(f"written: {path}", highlight=False, soft_wrap=True)
