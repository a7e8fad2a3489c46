"""What the tests of the workers share: a tiny model of every family, on disk once and loaded once."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from tests.tiny_models import FAMILIES, WINDOW, write_model
from workers.model import LoadedModel, ModelRequest, load_model

TARGET = 4 * WINDOW


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """A scorer asks for deterministic kernels and settles the threads; other tests keep their own."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture
def little_memory() -> Callable[[], AbstractContextManager[None]]:
    """A block in which this process gets 64 MiB more than it has, and no more."""

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    return limited


@pytest.fixture(scope="session", params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of every family in turn, at four times its window, on one thread."""
    folder = write_model(tmp_path_factory.mktemp("families") / request.param, request.param)
    return load_model(ModelRequest(str(folder), TARGET))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> LoadedModel:
    return load_model(ModelRequest(str(llama_folder), TARGET))
