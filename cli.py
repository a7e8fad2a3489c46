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

MOST_SHOWN = 1500  # characters of an error

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which cuts long options in a narrow terminal, and reads [extra] as markup
    help="Search LongRoPE rescale factors: let a language model read further than it was trained to.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (launch, extend, resume, evaluate, export, report, dashboard):
    app.command()(command)
app.command("import")(import_factors)
app.add_typer(studies_app, name="studies")


def shown(error: Exception) -> str:
    """On one line, whatever names and values it quotes: those may come from files that others wrote."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]} ... {text[-MOST_SHOWN // 2 :]}"


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        hide_password()
        app()
    except LongRopeError as error:
        print(f"Error: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # above all a standard output that takes no more
        advice = "free space or mend the access, then go on."
        print(f"Error: Reading or writing failed: {shown(error)}; {advice}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
