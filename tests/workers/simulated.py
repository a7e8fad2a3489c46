"""Ray and the clock for a pool whose workers are functions: what takes hours or a rare coincidence, in milliseconds.

Time passes only while the pool waits, and a ``ray.get`` of a call that has not ended is an error: the real one would
wait for it, maybe for ever. What real workers do is in test_pool.py and test_cluster.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from searcher.rope import RopeSpec
from searcher.study import Unit
from workers.model import ModelInfo, ModelRequest
from workers.scorer import PoolRequest

if TYPE_CHECKING:
    from workers.pool import RayScorer

LENGTH = 64
INFO = ModelInfo("weights", {"device": "this"}, RopeSpec(500.0, 16, LENGTH, 2), None, "half-split", probe=5.0)
START = 20.0  # seconds
NEVER = math.inf

# By the number of the process, from 0 in the order in which they began: seconds, and the value or error at their end.
Work = Callable[[int, Unit], tuple[float, object]]


@dataclass(eq=False)
class Call:
    """A call that ends at a moment."""

    ends: float
    value: object = None


@dataclass
class Simulation:
    """Ray's functions and time's, as far as the pool uses them."""

    now: float = 1000.0
    begun: int = 0
    killed: set[int] = field(default_factory=set)
    computed: list[tuple[int, str]] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def wait(self, calls: Sequence[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        until = sorted(call.ends for call in calls)[num_returns - 1]
        self.now = max(self.now, min(until, self.now + timeout))
        done = [call for call in calls if call.ends <= self.now]
        return done, [call for call in calls if call.ends > self.now]

    def get(self, calls: Call | list[Call], timeout: float = 0.0) -> Any:
        if isinstance(calls, list):
            self.now = max(self.now, min(max((call.ends for call in calls), default=0.0), self.now + timeout))
            return [self.get(call) for call in calls]
        if calls.ends > self.now:
            raise AssertionError("waits for a call that has not ended")
        if isinstance(calls.value, Exception):
            raise calls.value
        return calls.value

    def put(self, value: object) -> object:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "here", "Resources": {}}]

    def kill(self, actor: Any) -> None:
        self.killed.add(actor.process)

    def is_initialized(self) -> bool:
        return False

    def worker(self, work: Work, start: Callable[[int], object]) -> Any:
        process, self.begun = self.begun, self.begun + 1

        def method(answer: Callable[..., tuple[float, object]]) -> Any:
            def remote(*arguments: Any) -> Call:
                assert process not in self.killed
                seconds, value = answer(*arguments)
                return Call(self.now + seconds, value)

            return SimpleNamespace(remote=remote)

        def score(unit: Unit) -> tuple[float, object]:
            self.computed.append((process, unit.key))
            return work(process, unit)

        return SimpleNamespace(
            process=process,
            node=method(lambda: (0.0, "here")),
            share=method(lambda _room: (0.0, None)),
            start=method(lambda *_: (START, start(process))),
            score=method(score),
        )

    def pool(
        self,
        monkeypatch: pytest.MonkeyPatch,
        workers: int,
        work: Work,
        start: Callable[[int], object] = lambda _process: INFO,
        say: Callable[[str], None] | None = None,
    ) -> RayScorer:
        """A pool of so many workers, with a time limit of 120 seconds."""
        import workers.crew as crew
        import workers.pool as pool

        for module in (crew, pool):
            monkeypatch.setattr(module, "ray", self)
            monkeypatch.setattr(module, "time", self)
        monkeypatch.setattr(crew, "join_cluster", lambda _address: None)
        monkeypatch.setattr(crew, "settle", lambda request, _threads: (0.0, request.workers))
        monkeypatch.setattr(crew, "nodes_alive", dict)
        monkeypatch.setattr(crew, "Head", lambda: SimpleNamespace(look=lambda: False))
        request = PoolRequest(workers, 0, "simulated")
        return pool.RayScorer(
            ModelRequest("nowhere", LENGTH), {}, request, lambda _number: self.worker(work, start), say
        )
