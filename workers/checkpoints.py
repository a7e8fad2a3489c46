"""Checkpoints that are whole: written aside, synced, renamed, and known by the digest of all their files."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole and on the disk: its step, its folder, and the SHA-256 of all its files."""

    step: int
    path: Path
    sha256: str


def folder_sha256(folder: Path) -> str:
    """Of the names and bytes of all files in a folder and below."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def settle(written: Path, final: Path) -> None:
    """Everything to the disk, then the name: whoever sees ``final`` sees all of it."""
    for path in [*written.rglob("*"), written]:
        _sync(path)
    if final.exists():  # of a run that was killed before it could tell
        replaced = written.with_name(f"{final.name}-replaced")
        final.rename(replaced)
        shutil.rmtree(replaced)
    written.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
