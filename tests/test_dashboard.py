"""``longrope dashboard``: what it mirrors, who it answers, how it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from searcher.rope import Factors
from searcher.study import Candidate, Document, Outcome
from storage.repository import Repository

if TYPE_CHECKING:
    from conftest import Longrope

DOCUMENT = Document("a", "a" * 64, 64)


def write(folder: Path, count: int, name: str = "s") -> None:
    """A study of so many candidates, all scored."""
    repository = Repository(f"sqlite:///{folder / 'longrope.db'}")
    repository.create_study(name, "search", {})
    with repository.open_study(name) as store:
        found = [Candidate(Factors((1.0, 2.0 + i)), "mutant") for i in range(count)]
        store.add_generation(0, "search", 0, found, [DOCUMENT], [[f"{i}"] for i in range(count)])
        for i in range(count):
            store.record(Outcome(f"{i}", 10.0 + i, 10, 1.0))
    repository.close()


def test_a_mirror_alone_for_optunas_own_plots(longrope: Longrope, tmp_path: Path) -> None:
    write(tmp_path, 3)
    told = json.loads(longrope("dashboard", "s", "--mirror-only", "--json").out)
    assert told == {"study": "s", "status": "stopped", "mirror": "s-optuna.log", "trials": 3}
    again = longrope("dashboard", "s", "--mirror-only")
    assert again.out.splitlines() == ["3 trials, 0 of them new", "mirror: s-optuna.log"]


def test_a_name_cannot_lead_out_of_the_folder(longrope: Longrope, tmp_path: Path) -> None:
    write(tmp_path, 1, "../up/../../out")
    told = json.loads(longrope("dashboard", "../up/../../out", "--mirror-only", "--json").out)
    assert "/" not in told["mirror"]
    assert (tmp_path / told["mirror"]).exists()


def test_a_study_that_is_not_there_makes_no_file(longrope: Longrope, tmp_path: Path) -> None:
    assert "There is no store" in longrope("dashboard", "s", "--mirror-only").err
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, 1)
    assert "There is no study 't'" in longrope("dashboard", "t", "--mirror-only").err
    assert not (tmp_path / "t-optuna.log").exists()


def test_a_port_that_is_taken_is_refused(longrope: Longrope, tmp_path: Path) -> None:
    write(tmp_path, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = longrope("dashboard", "s", f"--port={port}")
    assert ended.status == 1
    assert ended.err.startswith(f"Error: Nothing can listen at 127.0.0.1 port {port}: ")


@pytest.fixture
def served(tmp_path: Path, process_environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A dashboard of its own process, and its port."""
    write(tmp_path, 2)
    command = [sys.executable, "-m", "cli", "dashboard", "s", "--port=0", "--every=0.1", "--json"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=process_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "}\n")) + "}"
        url = json.loads(told)["url"]
        assert url.startswith("http://127.0.0.1:")
        yield process, int(url.split(":")[2].split("/")[0])
        process.kill()


def ask(port: int, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read()


def trials(port: int) -> list[dict[str, Any]]:
    status, body = ask(port, "/api/studies/0")
    return json.loads(body)["trials"] if status == 200 else []


def test_it_follows_answers_this_machine_alone_and_ends_with_ctrl_c(
    served: tuple[subprocess.Popen[str], int], tmp_path: Path
) -> None:
    process, port = served
    repository = Repository(f"sqlite:///{tmp_path / 'longrope.db'}")
    with repository.open_study("s") as store:
        store.add_generation(
            0, "search", 1, [Candidate(Factors((1.0, 9.0)), "late <b>")], [DOCUMENT], [["another key"]]
        )
        store.record(Outcome("another key", 5.0, 10, 1.0))
    repository.close()
    deadline = time.monotonic() + 60
    while len(trials(port)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    best = trials(port)[-1]
    assert best["state"] == "Complete"
    assert {"key": "origin", "value": "late <b>"} in best["user_attrs"]
    assert ask(port, "/dashboard")[0] == 200
    assert ask(port, "/dashboard", f"localhost:{port}")[0] == 200
    for stranger in ("example.org", f"example.org:{port}", "127.0.0.1.example.org", ""):
        assert ask(port, "/api/studies", stranger)[0] == 403
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
