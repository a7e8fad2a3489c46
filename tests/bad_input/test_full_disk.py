"""What is written where there is no space left: one clear line, nothing half-written, and a way to go on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.bad import LAUNCH
from tests.bad_input.place import STORE, Place, files, in_process_of_its_own, kept
from tests.conftest import Longrope
from tests.limits import files_no_larger_than


class TestFullDisk:
    """The disk is really full: a file system of a few pages, where this user may mount one; else a limit on files."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "longrope-test", str(folder)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system is not allowed here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    @staticmethod
    def fill(disk: Path) -> Path:
        path = disk / "ballast"
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        return path

    def test_under_the_store(
        self,
        disk: Path,
        longrope_in: Longrope,
        small_study: list[str],
        process_environment: dict[str, str],
        tmp_path: Path,
    ) -> None:
        """In a process of its own: on a full disk it can free the study only by its end."""
        storage = f"--storage=sqlite:///{disk / STORE}"
        launched = in_process_of_its_own(
            process_environment, tmp_path, ["launch", "--study=full", *small_study, storage]
        )
        assert launched.returncode == 1
        assert len(launched.stderr.splitlines()) == 1
        assert launched.stderr.startswith(f"Error: The store sqlite:///{disk / STORE} failed: ")
        assert "free space or mend the access, then `longrope resume full`" in launched.stderr
        assert "generation 0/2" in launched.stdout
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert longrope_in(tmp_path, "resume", "full", storage).status == 0
        assert self.undisturbed(longrope_in, small_study, tmp_path) == (tmp_path / "full-factors.json").read_bytes()

    def test_under_the_factor_file(
        self, disk: Path, longrope_in: Longrope, longrope: Longrope, small_study: list[str], tmp_path: Path
    ) -> None:
        ballast = self.fill(disk)
        launched = longrope("launch", "--study=full", *small_study, f"--out={disk}")
        assert launched.status == 1
        assert (
            launched.err
            == f"Error: The factor file {disk}/full-factors.json cannot be written: No space left on device.\n"
        )
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        ballast.unlink()
        resumed = longrope("resume", "full")
        assert resumed.status == 0
        assert "\n0 evaluations computed" in resumed.out
        assert self.undisturbed(longrope_in, small_study, tmp_path) == (disk / "full-factors.json").read_bytes()

    def test_under_the_tokens(self, disk: Path, place: Place, tmp_path: Path) -> None:
        self.fill(disk)
        before = kept(tmp_path)
        ended = place.longrope(*place.arguments(LAUNCH), LONGROPE_CACHE=str(disk / "cache"))
        assert (ended.status, ended.out) == (1, "")
        assert len(ended.err.splitlines()) == 1
        assert "No space left on device); make room there, or set LONGROPE_CACHE to another folder." in ended.err
        assert kept(tmp_path) == before

    def test_under_an_export(self, disk: Path, place: Place) -> None:
        self.fill(disk)
        before = files(disk)
        export = "export done --method pi --out"
        for form in ("--to transformers", "--to transformers-config", "--to json"):
            ended = place.longrope(*place.arguments(f"{export} {disk / 'exported'} {form}"))
            assert (ended.status, ended.out) == (1, "")
            assert len(ended.err.splitlines()) == 1
            assert "exported cannot be written: No space left on device" in ended.err
            assert files(disk) == before

    @staticmethod
    def undisturbed(longrope_in: Longrope, small_study: list[str], tmp_path: Path) -> bytes:
        """The factor file of the same study where there is space."""
        folder = tmp_path / "undisturbed"
        folder.mkdir()
        assert longrope_in(folder, "launch", "--study=full", *small_study).status == 0
        return (folder / "full-factors.json").read_bytes()

    def test_as_a_limit_on_files(self, longrope: Longrope, small_study: list[str], tmp_path: Path) -> None:
        """What any user can try: no file may grow beyond 128 KiB, so the store meets EFBIG in the middle."""
        with files_no_larger_than(128 * 1024):
            launched = longrope("launch", "--study=full", *small_study)
        assert launched.status == 1
        assert len(launched.err.splitlines()) == 1
        assert launched.err.startswith(f"Error: The store sqlite:///{STORE} failed: ")
        assert longrope("resume", "full").status == 0
        assert (tmp_path / "full-factors.json").is_file()

    def test_under_standard_output(self, world: Path, process_environment: dict[str, str]) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        for arguments in (["studies"], ["studies", "show", "done", "--json"]):
            with Path("/dev/full").open("w") as full:
                ended = subprocess.run(
                    [sys.executable, "-m", "cli", *arguments],
                    env=process_environment,
                    cwd=world,
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                    check=False,
                )
            assert ended.returncode == 1
            assert len(ended.stderr.splitlines()) == 1
            assert ended.stderr.startswith("Error: Reading or writing failed: [Errno 28] No space left on device")
