"""A database's password is in no output, no file, no process list and no worker's environment."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import psutil
import pytest
from postgres_server import PASSWORD, Server

from commands.command_line import _without_password
from searcher.errors import LongRopeError
from storage.database import WHOLE_ADDRESS, parse, without_password
from storage.repository import Repository

if TYPE_CHECKING:
    from conftest import Longrope

StopAfter = Callable[[pytest.MonkeyPatch, int], None]

# In every spelling that an address or an error may have.
SPELLINGS = {PASSWORD, quote(PASSWORD), quote(PASSWORD, safe=""), "hunter2"}
COMMAND = [sys.executable, "-m", "cli"]


def leaks(text: str) -> set[str]:
    return {spelling for spelling in SPELLINGS if spelling in text}


@pytest.fixture
def url(postgres: Server) -> str:
    return postgres.new_database()


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "left"),
        [
            ("postgresql://u:hunter2@h/d", "postgresql://u@h/d"),
            ("postgresql+psycopg://u:h%40%2F@h:5/d?sslmode=require", "postgresql+psycopg://u@h:5/d?sslmode=require"),
            ("postgresql:///d?host=h&password=hunter2", "postgresql:///d?host=h"),
            ("postgresql://u@h/d?sslpassword=hunter2", "postgresql://u@h/d"),
            ("postgresql://u:hunter2@h/d?sslpassword=p%40@ss&sslmode=require", "postgresql://u@h/d?sslmode=require"),
            ("mysql+pymysql://u:hunter2@h/d", "mysql+pymysql://u@h/d"),
            ("postgresql://u@h/d", "postgresql://u@h/d"),
            ("sqlite:////data/a@b.db?timeout=5", "sqlite:////data/a@b.db?timeout=5"),
        ],
    )
    def test_what_is_left_and_what_comes_back(self, url: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The address that a command line keeps leads, with what its environment keeps, to all that was there."""
        assert without_password(url) == left
        hidden, whole = _without_password(["studies", "--storage", url])
        assert hidden == ["studies", "--storage", left]
        assert whole == (None if left == url else url)
        monkeypatch.delenv("PGPASSWORD", raising=False)
        if "data" not in url:
            found = parse(url)
            monkeypatch.setenv(WHOLE_ADDRESS, url)
            assert parse(left) == found
            assert parse("postgresql://other@h/d").username == "other"

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://u:hunter2@secret@host/d",
            "postgresql://u:p@hunter2/secret@host/d",
            "postgresql://u:p@hunter2?secret@host/d",
            "postgresql://u:p@hunter2?secret@host/d?sslmode=require",
            "postgresql://u:hunter2@secret@h1,h2:5432/d",
            "mysql+pymysql://u:hunter2@secret@host/d",
        ],
    )
    def test_an_at_sign_that_is_not_escaped(self, url: str, longrope: Longrope) -> None:
        """A part of the password would pass for the host, and be printed as that."""
        for refuse in (parse, without_password, lambda it: _without_password(["launch", f"--storage={it}"])):
            with pytest.raises(LongRopeError, match="write @ as %40") as info:
                refuse(url)
            assert not re.search("hunter2|secret", str(info.value))
        for given, environment in (([f"--storage={url}"], {}), ([], {"LONGROPE_STORAGE": url})):
            ended = longrope("studies", *given, **environment)
            assert (ended.status, ended.err.count("\n")) == (1, 1)
            assert ended.err.startswith("Error: The address of the store has an @ after")
            assert not re.search("hunter2|secret", ended.out + ended.err)

    def test_pgpassword_is_taken_as_libpq_takes_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGPASSWORD", "from the environment")
        assert parse("postgresql://u@h/d").password == "from the environment"
        assert parse("postgresql://u:own@h/d").password == "own"
        assert parse("postgresql://u@h/d?password=own").password is None
        assert parse("postgresql://u@h/d?service=s").password is None
        assert parse("sqlite:///longrope.db").password is None

    @pytest.mark.parametrize(
        ("arguments", "expected", "secret"),
        [
            (
                ["resume", "s", "--storage", "postgresql://u:p@h/d"],
                ["resume", "s", "--storage", "postgresql://u@h/d"],
                "postgresql://u:p@h/d",
            ),
            (
                ["resume", "--storage=postgresql://u:p@h/d", "s"],
                ["resume", "--storage=postgresql://u@h/d", "s"],
                "postgresql://u:p@h/d",
            ),
            (
                ["studies", "--storage=postgresql://u:p@h/d", "--storage=postgresql://u@h/d"],
                ["studies", "--storage=postgresql://u@h/d", "--storage=postgresql://u@h/d"],
                None,
            ),
            (
                ["studies", "--storage=postgresql://u:p@h/d", "--storage=postgresql://u:q@h/d"],
                ["studies", "--storage=postgresql://u@h/d", "--storage=postgresql://u@h/d"],
                "postgresql://u:q@h/d",
            ),
            (["launch", "--data", "postgresql://u:p@h/d"], ["launch", "--data", "postgresql://u:p@h/d"], None),
            (["launch", "--storage=postgres:u@:x//["], ["launch", "--storage=postgres:u@:x//["], None),
            (["launch", "--storage"], ["launch", "--storage"], None),
        ],
    )
    def test_of_a_command_line(self, arguments: list[str], expected: list[str], secret: str | None) -> None:
        assert _without_password(arguments) == (expected, secret)


class TestErrors:
    def test_a_wrong_password(self, url: str) -> None:
        wrong = url.replace("hunter2", "hunter2wrong")
        with pytest.raises(LongRopeError, match="password authentication failed") as info:
            Repository(wrong)
        assert leaks(str(info.value)) == set()

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://u:hunter2@/d?host=/nowhere",
            "postgresql://u:hunter2@h:port/d",
            "postgresql://u:hunter2@/d?host=/nowhere&connect_timeout=hunter2&password=hunter2",
            "postgresql://u@/d?host=/nowhere&conninfo=password%3Dhunter2",
            "postgresql://u:hunter2@/d?sslpassword=hunter2&sslmode=hunter",
            "mysql://u:hunter2@h/d",
        ],
    )
    def test_addresses_that_lead_nowhere(self, longrope: Longrope, url: str) -> None:
        for arguments in (("studies",), ("resume", "s"), ("export", "s"), ("studies", "delete", "s", "--yes")):
            ended = longrope(*arguments, f"--storage={url}")
            assert ended.status != 0
            assert leaks(ended.out + ended.err) == set()


def test_a_whole_study_shows_it_nowhere(
    longrope: Longrope, small_study: list[str], url: str, tmp_path: Path, stop_after: StopAfter
) -> None:
    """Launched, stopped, resumed, listed, exported and reported, with everything that was printed or written."""
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        stopped = longrope("launch", "--study=kept", f"--storage={url}", *small_study)
    assert stopped.status == 130
    (hint,) = re.findall("Go on with: (.*)", stopped.out + stopped.err)
    assert hint.startswith("longrope resume kept --storage ")
    printed.append(stopped)
    for arguments in (
        ["resume", "kept", "--json"],
        ["studies"],
        ["studies", "show", "kept"],
        ["studies", "show", "kept", "--json"],
        ["export", "kept", "--out=again.json"],
        ["resume", "kept"],
    ):
        printed.append(longrope(*arguments, f"--storage={url}"))
    assert [ended.status for ended in printed] == [130, 0, 0, 0, 0, 0, 1]
    assert leaks("".join(ended.out + ended.err for ended in printed)) == set()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if leaks(path.read_bytes().decode(errors="replace"))] == []


@pytest.mark.parametrize("given", ["whole", "without its password", "by the environment"])
def test_the_hint_leads_back(
    longrope: Longrope, small_study: list[str], url: str, stop_after: StopAfter, given: str
) -> None:
    """What is printed without the password leads to the same store with the password in the environment."""
    option, environment = {
        "whole": ([f"--storage={url}"], {}),
        "without its password": ([f"--storage={without_password(url)}"], {"PGPASSWORD": PASSWORD}),
        "by the environment": ([], {"LONGROPE_STORAGE": url}),
    }[given]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        stopped = longrope("launch", "--study=kept", *option, *small_study, **environment)
    (hint,) = re.findall("Go on with: longrope resume kept ?(.*)", stopped.out + stopped.err)
    assert ("--storage" in hint) == bool(option)
    shown = longrope("studies", "show", "kept", *shlex.split(hint), **(environment or {"PGPASSWORD": PASSWORD}))
    assert shown.status == 0, shown.err


@pytest.fixture
def driver(
    small_study: list[str], url: str, tmp_path: Path, process_environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A driver with Ray workers, with its password on the command line, as users type it."""
    options = [option for option in small_study if option != "--in-process"]
    more = ["--population=64", "--workers=1", f"--storage={url}", "--study=shown"]
    process = subprocess.Popen(
        [*COMMAND, "launch", *options, *more],
        cwd=tmp_path,
        env=process_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)


@pytest.mark.ray
@pytest.mark.slow
def test_processes_do_not_show_it(driver: subprocess.Popen[str]) -> None:
    """Neither the driver's title nor any environment or title of what it has started, Ray's workers among it."""
    top = psutil.Process(driver.pid)
    deadline = time.monotonic() + 200
    while not any(process.name().startswith("ray::") for process in top.children(recursive=True)):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert leaks(" ".join(top.cmdline())) == set()
    assert "--storage=postgresql://postgres@/" in " ".join(top.cmdline())
    seen, titles = 0, ""
    for process in top.children(recursive=True):
        try:
            shown = " ".join([*process.cmdline(), *(f"{k}={v}" for k, v in process.environ().items())])
        except psutil.Error:
            continue
        seen += 1
        titles += " ".join(process.cmdline())
        assert leaks(shown) == set(), process.cmdline()
    assert seen > 3
    (session,) = {Path(found) for found in re.findall(r"/tmp/ray/session_[\w-]+", titles)}
    logs = [path for path in session.rglob("*") if path.is_file() and path.stat().st_size < 2**24]
    assert logs
    assert [path for path in logs if leaks(path.read_bytes().decode(errors="replace"))] == []


@pytest.mark.parametrize("where", ["before the host", "among the parameters"])
def test_the_title_loses_it(url: str, tmp_path: Path, process_environment: dict[str, str], where: str) -> None:
    if where == "among the parameters":
        url = f"{without_password(url)}&password={quote(PASSWORD, safe='')}&sslpassword=hunter2"
    shown = f"postgres{':***' if where == 'before the host' else ''}@/"
    started = subprocess.Popen(
        [*COMMAND, "studies", "--storage", url],
        cwd=tmp_path,
        env=process_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process, title = psutil.Process(started.pid), ""
    while started.poll() is None:
        with suppress(psutil.Error):
            title = " ".join(process.cmdline()) or title
        time.sleep(0.005)
    out, err = started.communicate()
    assert started.returncode == 1
    assert f"There is no store at postgresql+psycopg://{shown}" in err, "it had the password nevertheless"
    assert "--storage postgresql://postgres@/" in title
    assert leaks(title + out + err) == set()
