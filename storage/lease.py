"""One driver a study: who holds it, whether that driver still lives, and the heartbeat that shows it.

A lease is a token in the study's row. It is taken by one conditional UPDATE, proved by an UPDATE inside every
transaction that writes, and free for others once its owner is dead. On the owner's host that is seen at once; from
another host, or another PID namespace of the same one, an owner counts as dead after EXPIRY_SECONDS of silence.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from socket import gethostname
from typing import Any, cast

from sqlalchemy import CursorResult, Update, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from searcher.errors import LongRopeError
from storage.models import Study, database_now, now

HEARTBEAT_SECONDS = 15.0
EXPIRY_SECONDS = 60.0
PROC = Path("/proc")  # Linux


@dataclass(frozen=True)
class Owner:
    """A process, so described that another one can tell whether it still lives. Empty: this system does not say.

    Attributes
    ----------
    host: its name.
    boot_id: of the running kernel (Linux); differs after a reboot.
    namespace: in which the pid counts (Linux); containers of one host may share its name and not its pids.
    pid, started: the process and when it started; a pid alone may have been given to another process since.
    """

    host: str
    boot_id: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Owner:
        """A process of this host."""
        return cls(gethostname(), _boot_id(), _pid_namespace(), pid, process_start(pid) or "")

    def is_dead(self, here: Owner, silence: float) -> bool:
        """Whether the process is gone, as seen by ``here`` after ``silence`` seconds without a heartbeat."""
        if self.host == here.host and self.boot_id != here.boot_id:
            # Rebooted since; or another machine of the same name, whose heart still beats.
            return silence > 2 * HEARTBEAT_SECONDS
        visible = self.host == here.host and self.namespace == here.namespace
        if visible and (started := process_start(self.pid)) != "" and self.started:
            return started != self.started
        return silence > EXPIRY_SECONDS


def process_start(pid: int) -> str | None:
    """When a process started, in the system's own words; None when there is no such process, "" when unknown.

    A zombie, a process that has ended and whose parent has not noticed, counts as none.
    """
    if (PROC / "self" / "stat").exists():
        try:
            # The second field is the program's name in parentheses and may hold anything (see proc(5)).
            fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return "" if _exists(pid) else None
        return None if fields[0] in "ZX" else fields[19]
    try:
        ps = subprocess.run(
            ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    state, _, started = ps.stdout.strip().partition(" ")
    return None if state[:1] in ("", "Z") else started.strip()


def _exists(pid: int) -> bool:
    """Also of a process that /proc hides, as it does with other users' under hidepid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    with suppress(OSError):
        return (PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    with suppress(OSError):
        return str((PROC / "self" / "ns" / "pid").readlink())
    return ""


SEEN = (Study.lease_owner, Study.lease_heartbeat_at, database_now())  # what tells whether a live driver holds a study


def is_held(owner: Mapping[str, Any] | None, heartbeat_at: datetime | None, clock: datetime, here: Owner) -> bool:
    """Whether a live driver holds a study, by its row's columns SEEN; writes nothing."""
    if owner is None or heartbeat_at is None:
        return False
    return not Owner(**owner).is_dead(here, (clock - heartbeat_at).total_seconds())


def acquire(session: Session, study_id: int, name: str, here: Owner, mine: str) -> None:
    """Take a study that nobody, or a dead owner, holds.

    Parameters
    ----------
    mine: the token that proves it from now on; where the study has it already, an earlier try was not in vain.

    Raises
    ------
    LongRopeError
        A live driver holds it.
    """
    seen = select(Study.lease_token, Study.lease_owner, Study.lease_version, Study.lease_heartbeat_at, database_now())
    while True:
        token, owner, version, heartbeat_at, clock = session.execute(seen.where(Study.id == study_id)).one()
        if token == mine:
            return
        if token is not None:
            _refuse_if_alive(Owner(**owner), here, name, (clock - heartbeat_at).total_seconds())
        values = {"lease_token": mine, "lease_owner": asdict(here), "lease_heartbeat_at": database_now()}
        # Any change since the SELECT, a heartbeat or a faster rival, has moved the version on: look again.
        if _changed(session, _lease(study_id, **values).where(Study.lease_version == version)):
            return


def _refuse_if_alive(owner: Owner, here: Owner, name: str, silence: float) -> None:
    if owner.is_dead(here, silence):
        return
    message = (
        f"The study {name!r} is held by process {owner.pid} on host {owner.host}, last heard of "
        f"{max(silence, 0):.0f} s ago; wait for it to end, or stop it and try again."
    )
    if (owner.host, owner.namespace) != (here.host, here.namespace):
        message += f" From here it counts as gone after {EXPIRY_SECONDS:.0f} s of silence."
    raise LongRopeError(message)


class AlreadyWritten(Exception):
    """The transaction that is to be done again was committed; only the answer was lost."""


def fence(session: Session, study_id: int, name: str, token: str, unsure: datetime | None = None) -> datetime:
    """Prove the lease inside a transaction that writes, and note that the study changed; first of its statements.

    An UPDATE, not a SELECT: the row stays locked until the commit, so no takeover can come in between.

    Parameters
    ----------
    unsure: when this same transaction was tried before and nobody knows how that ended, as returned then.

    Returns
    -------
    when the study changes by this transaction: nothing else writes that.

    Raises
    ------
    AlreadyWritten
        The earlier try was committed.
    LongRopeError
        Another driver has taken the study over.
    """
    if unsure is not None:
        # Locked, so that an earlier try that its server is still at comes to its end first.
        last = select(Study.updated_at).where(Study.id == study_id, Study.lease_token == token).with_for_update()
        if session.execute(last).scalar() == unsure:
            raise AlreadyWritten
    moment = now()
    held = update(Study).where(Study.id == study_id, Study.lease_token == token).values(updated_at=moment)
    if _changed(session, held):
        return moment
    owner = session.execute(select(Study.lease_owner).where(Study.id == study_id)).scalar()
    what = "is gone" if owner is None else f"was taken over by process {owner['pid']} on host {owner['host']}"
    raise LongRopeError(
        f"The study {name!r} {what} while this driver was silent; it stops, and the result it had was not written."
    )


def beat(session: Session, study_id: int, token: str) -> bool:
    """Show that the owner lives; False where the lease is another's by now."""
    return _changed(session, _lease(study_id, lease_heartbeat_at=database_now()).where(Study.lease_token == token))


def release(session: Session, study_id: int, token: str) -> None:
    """Free the study; nothing happens where the lease is another's by now."""
    values = {"lease_token": None, "lease_owner": None, "lease_heartbeat_at": None}
    _changed(session, _lease(study_id, **values).where(Study.lease_token == token))


def _lease(study_id: int, **values: Any) -> Update:
    return update(Study).where(Study.id == study_id).values(lease_version=Study.lease_version + 1, **values)


def _changed(session: Session, statement: Update) -> bool:
    return cast("CursorResult[Any]", session.execute(statement)).rowcount == 1


class Heartbeat:
    """Calls ``beat`` from a daemon thread every ``interval`` seconds, until it returns False or is stopped."""

    def __init__(self, beat: Callable[[], bool], interval: float) -> None:
        self._beat = beat
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longrope-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            # A busy, full or absent database is met again by the driver's next write, which reports it. A heartbeat
            # that is missed costs nothing by itself: on this host the process is seen, others wait for four.
            with suppress(SQLAlchemyError, LongRopeError):
                if not self._beat():
                    return

    def stop(self) -> None:
        """Let the thread end. One that is just waiting for the database is left behind; its beat can do no harm."""
        self._stopped.set()
        self._thread.join(timeout=1.0)
