"""The command ``longrope``. Heavy imports live inside the commands, so that help is instant."""

from __future__ import annotations

import os
import sys

import typer

from commands.command_line import hide_password
from commands.dashboard import dashboard
from commands.evaluate import evaluate
from commands.export import export
from commands.extend import extend
from commands.imports import import_factors
from commands.launch import launch, resume
from commands.report import report
from commands.studies import studies_app
from searcher.errors import LongRopeError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Search LongRoPE rescale factors: let a language model read further than it was trained to.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (launch, extend, resume, evaluate, export, report, dashboard):
    app.command()(command)
app.command("import")(import_factors)
app.add_typer(studies_app, name="studies")


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit status 1."""
    hide_password()
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
