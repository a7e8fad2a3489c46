"""Ends what a killed driver leaves of the Ray cluster that it had started: a process of its own, without packages.

The kernel kills Ray's servers together with a driver that is killed, and the workers follow within seconds. Two agents
of Ray do not: for a minute they try to report the loss to a server that is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ROUNDS = 50  # of a tenth of a second


def main() -> None:
    """Wait until standard input ends, as it does however its writer ends; then kill the cluster's Python processes.

    They are known by their title, and by their log files in the session's folder, which is the argument. Linux only:
    elsewhere there is no /proc, and nothing happens.
    """
    sys.stdin.buffer.read()
    for _ in range(ROUNDS):
        found = [process for process in Path("/proc").glob("[0-9]*") if _belongs(process, f"{sys.argv[1]}/")]
        for process in found:
            with suppress(OSError):
                os.kill(int(process.name), signal.SIGKILL)
        if not found:
            return
        time.sleep(0.1)


def _belongs(process: Path, session: str) -> bool:
    with suppress(OSError):  # another user's, or gone by now
        if (process / "cmdline").read_bytes().startswith(b"ray::"):
            return any(str(file.readlink()).startswith(session) for file in (process / "fd").iterdir())
    return False


if __name__ == "__main__":
    main()
