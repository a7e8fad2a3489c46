"""The live view in a real terminal: it changes nothing that is computed, and leaves the terminal as it was."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Longrope

SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"


def resize(terminal: int, columns: int, rows: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def in_terminal(
    command: list[str], folder: Path, environment: dict[str, str], seen: Callable[[int, bytes], None]
) -> tuple[int, bytes, bytes]:
    """Exit status, what the command wrote to a terminal of 100 by 30, and its standard output, which is a pipe.

    ``seen`` is told the terminal and all that was written to it so far, whenever there is more.
    """
    terminal, other_end = pty.openpty()
    resize(terminal, 100, 30)
    kept = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *command],
        cwd=folder,
        env={**kept, "TERM": "xterm-256color", "LANG": "C.UTF-8"},
        stdin=other_end,
        stdout=subprocess.PIPE,
        stderr=other_end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(other_end)
    written, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed: on Linux an error, not an end
            part = b""
        if not part:
            break
        written += part
        seen(terminal, written)
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    return process.returncode, written, out


@pytest.fixture(scope="module")
def plain(longrope_in: Longrope, small_study: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The factor file of the same study on a pipe."""
    folder = tmp_path_factory.mktemp("plain")
    ended = longrope_in(folder, "launch", "--study=watched", *small_study)
    assert ended.status == 0, ended.err
    assert "\x1b" not in ended.out
    return (folder / "watched-factors.json").read_bytes()


def test_a_search_that_is_watched_and_resized_finds_the_same(
    plain: bytes, small_study: list[str], tmp_path: Path, process_environment: dict[str, str]
) -> None:
    sizes = iter([(40, 10), (200, 60), (1, 1), (100, 30)])

    def seen(terminal: int, written: bytes) -> None:
        if b" gone" in written and (size := next(sizes, None)):
            resize(terminal, *size)

    command = ["launch", "--study=watched", "--json", *small_study]
    status, written, out = in_terminal(command, tmp_path, process_environment, seen)
    assert status == 0, written
    assert out.startswith(b"{\n")
    assert out.endswith(b"}\n")
    assert b"\x1b" not in out
    assert b" gone" in written
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    assert (tmp_path / "watched-factors.json").read_bytes() == plain


def test_ctrl_c_stops_cleanly_and_gives_the_cursor_back(
    small_study: list[str], tmp_path: Path, process_environment: dict[str, str]
) -> None:
    pressed: list[bool] = []

    def seen(terminal: int, written: bytes) -> None:
        if b" gone" in written and not pressed:
            pressed.append(True)
            os.write(terminal, b"\x03")

    command = ["launch", "--study=watched", "--json", *small_study, "--generations=400"]
    status, written, out = in_terminal(command, tmp_path, process_environment, seen)
    assert pressed
    assert (status, out) == (130, b"")
    end = written[written.rindex(SHOW_CURSOR) :]
    assert b"Stopped; what was computed is kept. Go on with: longrope resume watched" in end
    assert b"Traceback" not in written
