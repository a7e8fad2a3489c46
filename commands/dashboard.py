"""``longrope dashboard``: optuna-dashboard on a mirror of a study."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from socket import AF_INET, AF_INET6
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Annotated, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import typer

from commands.options import DEFAULT_STORAGE, AsJson, Storage, open_console, print_json, stem
from searcher.errors import LongRopeError, needs

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from rich.console import Console

    from storage.mirror import Mirror

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHARE = 20  # of the time between two looks at the store, a look takes at most one such part


def dashboard(
    study: Annotated[str, typer.Argument(help="Name of the study, running or not.")],
    storage: Storage = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own have no lock.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    mirror: Annotated[
        Path | None, typer.Option(help="Journal file the mirror is kept in; STUDY-optuna.log here if not given.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at a running study.")] = 2.0,
    mirror_only: Annotated[
        bool, typer.Option("--mirror-only", help="Bring the mirror up to date, for Optuna's own plots, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a study in optuna-dashboard: on a mirror in a file of its own, which follows while the study runs.

    Needs the extra: pip install 'longrope-search[dashboard]'. Example: longrope dashboard my-study
    """
    from storage.mirror import Mirror
    from storage.repository import Repository

    repository = Repository(storage, create=False)
    goes_on = repository.study(study).status == "running"  # asked before a file is made
    console = open_console(stderr=as_json)
    with closing(Mirror(repository, study, mirror or Path(f"{stem(study)}-optuna.log"))) as kept:
        if not mirror_only:
            _serve(kept, study, host, port, every, console, as_json, goes_on)
            return
        synced = kept.sync()
    if as_json:
        print_json({"study": study, "status": synced.status, "mirror": str(kept.path), "trials": synced.trials})
        return
    console.print(f"{synced.trials} trials, {synced.written} of them new", highlight=False)
    console.print(f"mirror: {kept.path}", highlight=False, soft_wrap=True)


def _serve(
    mirror: Mirror, study: str, host: str, port: int, every: float, console: Console, as_json: bool, goes_on: bool
) -> None:
    """Serve the dashboard, and follow the study, until Ctrl-C."""
    with needs("The dashboard (--mirror-only does not)", "optuna-dashboard", "dashboard"):
        from optuna_dashboard import wsgi
    app = wsgi(mirror.storage)
    with _listening(app if host not in LOOPBACK else _for_this_machine(app), host, port) as server:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{server.server_port}/dashboard"
        if as_json:
            print_json({"study": study, "url": url, "mirror": str(mirror.path)})
            sys.stdout.flush()
        ends = "Ctrl-C ends it; the search goes on" if goes_on else "Ctrl-C ends it"
        console.print(f"dashboard of {study}: {url} ({ends})", highlight=False)
        if host not in LOOPBACK:
            console.print(
                f"Whoever reaches {host} can look at the mirror and change it; there is no password.", highlight=False
            )
        if hasattr(os, "nice"):
            os.nice(10)  # the search goes first
        threading.Thread(target=_follow, args=(mirror, every, console), name="longrope-mirror", daemon=True).start()
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _follow(mirror: Mirror, every: float, console: Console) -> None:
    """Bring the mirror up to date for as long as this process lives; what fails is said once and tried again."""
    said = ""
    while True:
        begun = time.monotonic()
        try:
            mirror.sync()
            said = ""
        except LongRopeError as error:
            if str(error) != said:
                said = str(error)
                console.print(f"The mirror does not follow: {said}", highlight=False)
        time.sleep(max(every, SHARE * (time.monotonic() - begun)))


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request; none of them keeps the process."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Without asking the network for this machine's name, which can take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Quiet(WSGIRequestHandler):
    """Says nothing of requests."""

    def log_message(self, format: str, *args: Any) -> None: ...


def _listening(app: WSGIApplication, host: str, port: int) -> WSGIServer:
    kind = type("Server", (_Server,), {"address_family": AF_INET6 if ":" in host else AF_INET})
    try:
        return make_server(host, port, app, kind, _Quiet)
    except OSError as error:
        raise LongRopeError(
            f"Nothing can listen at {host} port {port}: {error.strerror}; give another --port, or 0 for a free one."
        ) from error


def _for_this_machine(app: WSGIApplication) -> WSGIApplication:
    """Answer only to this machine's own names: a page from elsewhere cannot reach in under a name of its own."""

    def guarded(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        name = environ.get("HTTP_HOST", "").rpartition(":")[0] or environ.get("HTTP_HOST", "")
        if name.strip("[]") in LOOPBACK:
            return app(environ, start)
        start("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"This dashboard answers at 127.0.0.1 and localhost only.\n"]

    return guarded
