"""A pool of real Ray workers: the bits of one process, each outcome once whoever dies, and clear refusals."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import WINDOW, window

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from searcher.study import Document, Outcome, Unit
from workers.model import ModelInfo, ModelRequest
from workers.scorer import LocalScorer, PoolRequest, open_scorer

if TYPE_CHECKING:
    from workers.pool import RayScorer

# ray is imported late, after it was told how its processes shall talk.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LENGTH = 4 * WINDOW
DOCUMENTS = [Document(f"text {i}", str(i) * 64, LENGTH) for i in range(2)]
TOKENS = {document.sha256: window(LENGTH, seed) for seed, document in enumerate(DOCUMENTS)}
FACTORS = [Factors(tuple(1 + (i + 1) * pair / 8 for pair in range(8)), i % 5, 1.1) for i in range(12)]
UNITS = [
    Unit(f"{i:02}{j}", factors, document) for i, factors in enumerate(FACTORS) for j, document in enumerate(DOCUMENTS)
]


def values(outcomes: Sequence[Outcome]) -> dict[str, tuple[float | None, int, str | None]]:
    """What must not depend on who computed it; a key that came twice is an error."""
    found = {outcome.key: (outcome.nll, outcome.tokens, outcome.failure) for outcome in outcomes}
    assert len(found) == len(outcomes)
    return found


@pytest.fixture(scope="module", autouse=True)
def _as_open_scorer_does() -> None:
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a busy machine starves them
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> ModelRequest:
    return ModelRequest(str(tiny_llama_folder), LENGTH, device="cpu")


@pytest.fixture(scope="class")
def two_workers(model: ModelRequest) -> Iterator[RayScorer]:
    with open_scorer(model, TOKENS, PoolRequest(workers=2, gpus_per_worker=0)) as scorer:
        assert not isinstance(scorer, LocalScorer)
        yield scorer


@pytest.fixture(scope="class")
def local(model: ModelRequest) -> LocalScorer:
    return LocalScorer(model, TOKENS)


@pytest.fixture(scope="class")
def expected(local: LocalScorer) -> dict[str, tuple[float | None, int, str | None]]:
    found = values(list(local.evaluate(UNITS)))
    assert len({nll for nll, *_ in found.values()}) == len(UNITS)
    return found


class TestTwoWorkers:
    """On a cluster of their own."""

    def test_the_bits_of_one_process(self, two_workers: RayScorer, local: LocalScorer, expected: Any) -> None:
        assert two_workers.fingerprint == local.fingerprint
        outcomes = list(two_workers.evaluate(UNITS))
        assert values(outcomes) == expected
        assert {outcome.worker for outcome in outcomes} == {"ray-0", "ray-1"}

    def test_a_worker_killed_at_work(self, two_workers: RayScorer, expected: Any) -> None:
        """What it held is done again, by another; a new worker takes its place."""
        killed, other = two_workers.worker_pids()
        outcomes = two_workers.evaluate(UNITS)
        seen = [next(outcomes)]
        os.kill(killed, signal.SIGSTOP)
        seen += [next(outcomes) for _ in range(4)]  # of the other, by the last of them: this one holds a unit
        os.kill(killed, signal.SIGKILL)
        seen += outcomes
        assert values(seen) == expected
        new, same = two_workers.worker_pids()
        assert new != killed
        assert same == other
        assert values(list(two_workers.evaluate(UNITS))) == expected

    def test_an_evaluation_given_up(self, two_workers: RayScorer, expected: Any) -> None:
        """Calls of an iterator that was closed do not come out of the next."""
        with closing(two_workers.evaluate(UNITS)) as outcomes:
            next(outcomes)
        some = UNITS[5:9]
        assert values(list(two_workers.evaluate(some))) == {unit.key: expected[unit.key] for unit in some}


INFO = ModelInfo("weights", {"device": "this"}, RopeSpec(500.0, 16, WINDOW, 2), None, "half-split")
OTHER = replace(INFO, profile={"device": "that"})


@dataclass(frozen=True)
class Tally:
    """Counts across processes, and across their deaths: a file a name, a byte an event."""

    folder: Path

    def add(self, name: str) -> int:
        """How often, this one included."""
        with (self.folder / name).open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def of(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_size if path.exists() else 0


Pool = Callable[..., AbstractContextManager["RayScorer"]]


@pytest.fixture(scope="class")
def address() -> Iterator[str]:
    """A cluster that others started: two CPUs, on this machine's loopback interface."""
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
    from ray.cluster_utils import Cluster

    register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()
    unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def tally(tmp_path: Path) -> Tally:
    return Tally(tmp_path)


@pytest.fixture
def pool(address: str, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """``pool(on_score, on_start)``: two workers on that cluster that call these with the tally.

    ``on_score`` gets the key besides, ``on_start`` which start this is, and the request. The first of them starts
    twice: by itself, and with the weights that it has shared.
    """

    def opened(
        on_score: Callable[[Tally, str], None],
        on_start: Callable[[Tally, int, ModelRequest], ModelInfo] = lambda *_: INFO,
    ) -> AbstractContextManager[RayScorer]:
        import ray

        import workers.crew

        class Stub:
            def node(self) -> str:
                node: str = ray.get_runtime_context().get_node_id()
                return node

            def share(self, _room: float) -> None: ...

            def start(self, request: ModelRequest, _tokens: object, _weights: object) -> ModelInfo:
                return on_start(tally, tally.add("starts"), request)

            def score(self, unit: Unit) -> Outcome:
                began = time.perf_counter()
                tally.add(unit.key)
                on_score(tally, unit.key)
                return Outcome(unit.key, float(unit.key), LENGTH - 1, time.perf_counter() - began)

        def create_worker(cpus: int, _gpus: float) -> Any:
            return ray.remote(num_cpus=cpus, max_restarts=0, max_task_retries=0)(Stub).remote()

        monkeypatch.setattr(workers.crew, "create_worker", create_worker)
        return open_scorer(ModelRequest("nowhere", LENGTH), {}, PoolRequest(2, 0, address))  # type: ignore[return-value]

    return opened


class TestScheduling:
    """Who computes what, with real processes that really die, but without a model: they answer at once."""

    @pytest.mark.slow
    def test_every_outcome_once(self, pool: Pool, tally: Tally) -> None:
        doomed = {"020": 1, "031": 2, "110": 1}  # key to deaths

        def die_at_first(tally: Tally, key: str) -> None:
            if tally.of(key) <= doomed.get(key, 0):
                os._exit(1)

        with pool(die_at_first) as scorer:
            outcomes = list(scorer.evaluate(UNITS))
        assert values(outcomes) == {unit.key: (float(unit.key), LENGTH - 1, None) for unit in UNITS}
        assert {unit.key: tally.of(unit.key) for unit in UNITS} == {
            unit.key: 1 + doomed.get(unit.key, 0) for unit in UNITS
        }

    @pytest.mark.parametrize("poison", ["kills", pytest.param("raises", marks=pytest.mark.slow)])
    def test_a_unit_that_never_succeeds(self, pool: Pool, tally: Tally, poison: str) -> None:
        """Three attempts, then a failure to be stored; the others are computed."""

        def spoil(_tally: Tally, key: str) -> None:
            if key == "051" and poison == "kills":
                os._exit(1)
            if key == "051":
                raise RuntimeError("out of\n memory")

        with pool(spoil) as scorer:
            outcomes = values(list(scorer.evaluate(UNITS)))
        reason = "the worker died (3 attempts)" if poison == "kills" else "out of memory (3 attempts)"
        assert outcomes.pop("051") == (None, 0, reason)
        assert outcomes == {unit.key: (float(unit.key), LENGTH - 1, None) for unit in UNITS if unit.key != "051"}
        assert tally.of("051") == 3

    @pytest.mark.slow
    def test_all_workers_lost(self, pool: Pool, tally: Tally) -> None:
        """No endless replacing where replacements cannot even start; what was computed has been handed over."""

        def die_after_ten(tally: Tally, _key: str) -> None:
            if tally.add("scores") > 10:
                os._exit(1)

        def die_later(tally: Tally, *_: object) -> ModelInfo:
            if tally.of("scores") > 10:
                os._exit(1)
            return INFO

        seen: list[Outcome] = []
        with pool(die_after_ten, die_later) as scorer, pytest.raises(LongRopeError, match="All 2 workers were lost"):
            seen.extend(scorer.evaluate(UNITS))
        assert len(values(seen)) == 10
        assert tally.of("starts") == 3 + 2 * 3

    def test_workers_of_two_profiles(self, pool: Pool) -> None:
        """Refused at the start: their scores would differ."""

        def take_turns(_tally: Tally, start: int, _request: object) -> ModelInfo:
            return INFO if start < 3 else OTHER

        with pytest.raises(LongRopeError, match="differs from the first in device"), pool(lambda *_: None, take_turns):
            pass

    @pytest.mark.slow
    def test_a_replacement_of_another_profile(self, pool: Pool, tally: Tally) -> None:
        """It computes nothing; the worker that is left does all."""

        def die_once(tally: Tally, _key: str) -> None:
            if tally.add("scores") == 1:
                os._exit(1)
            time.sleep(0.3)  # the replacements come while there is work

        def differ_later(_tally: Tally, start: int, _request: object) -> ModelInfo:
            return INFO if start <= 3 else OTHER

        with pool(die_once, differ_later) as scorer:
            outcomes = list(scorer.evaluate(UNITS))
        assert values(outcomes) == {unit.key: (float(unit.key), LENGTH - 1, None) for unit in UNITS}
        assert len({outcome.worker for outcome in outcomes}) == 1
        assert tally.of("starts") > 3

    @pytest.mark.slow
    def test_workers_of_two_chunks(self, pool: Pool, tally: Tally) -> None:
        """All take the smaller one, and so do their replacements."""

        def choose(tally: Tally, start: int, request: ModelRequest) -> ModelInfo:
            tally.add(f"told {request.chunk}")
            return replace(INFO, profile={"device": "this", "chunk": request.chunk or (512 if start == 3 else 1024)})

        def die_once(tally: Tally, _key: str) -> None:
            if tally.add("scores") == 1:
                os._exit(1)
            time.sleep(0.3)  # the replacement comes while there is work

        with pool(die_once, choose) as scorer:
            assert scorer.info.profile["chunk"] == 512
            assert tally.of("starts") == 3 + 1
            assert {outcome.worker for outcome in scorer.evaluate(UNITS)} == {"ray-0", "ray-1"}
        assert tally.of("told 512") == 1 + 1

    @pytest.mark.slow
    def test_nothing_works(self, pool: Pool, tally: Tally) -> None:
        """It ends after a few candidates, not after three restarts for each."""

        def fail(_tally: Tally, _key: str) -> None:
            raise RuntimeError("no kernel image")

        with (
            pool(fail) as scorer,
            pytest.raises(LongRopeError, match=r"None of the first .* no kernel image; mend that"),
        ):
            list(scorer.evaluate(UNITS))
        assert tally.of("starts") <= 3 + 9

    @pytest.mark.slow
    def test_one_candidate_that_never_works(self, pool: Pool, tally: Tally) -> None:
        """It alone has failed, whatever else is left to do: a study must be able to go on without it."""

        def fail(_tally: Tally, _key: str) -> None:
            raise RuntimeError("overflow")

        with pool(fail) as scorer:
            outcomes = values(list(scorer.evaluate(UNITS[:2])))
        assert outcomes == {unit.key: (None, 0, "overflow (3 attempts)") for unit in UNITS[:2]}
        assert all(tally.of(unit.key) == 3 for unit in UNITS[:2])

    def test_places_that_share_an_actor(self, address: str) -> None:
        """Each has a call of its own in flight: one by itself would wait for the other for ever."""
        import ray

        from workers.pool import RayScorer

        class Pair:
            def __init__(self) -> None:
                self.both = threading.Barrier(2, timeout=60)

            def node(self) -> str:
                node: str = ray.get_runtime_context().get_node_id()
                return node

            def share(self, _room: float) -> None: ...

            def start(self, *_: object) -> ModelInfo:
                return INFO

            def score(self, unit: Unit) -> Outcome:
                self.both.wait()
                return Outcome(unit.key, float(unit.key), LENGTH - 1)

        actors: list[Any] = []

        def create(number: int) -> Any:
            if number == 0:
                actors.append(ray.remote(num_cpus=0, max_concurrency=2)(Pair).remote())
            return actors[-1]

        scorer = RayScorer(ModelRequest("nowhere", LENGTH), {}, PoolRequest(2, 0, address), create)
        try:
            outcomes = list(scorer.evaluate(UNITS))
        finally:
            scorer.close()
        assert values(outcomes) == {unit.key: (float(unit.key), LENGTH - 1, None) for unit in UNITS}
        assert {outcome.worker for outcome in outcomes} == {"ray-0", "ray-1"}

    @pytest.mark.parametrize(
        ("workers", "gpus", "threads", "lack"), [(3, 0, 1, "2 CPUs"), (1, 1, 1, "0 GPUs"), (None, 0, 3, "2 CPUs")]
    )
    def test_more_than_the_cluster_has(
        self, address: str, workers: int | None, gpus: float, threads: int, lack: str
    ) -> None:
        """Said at once, where Ray would wait for a node that never comes."""
        began = time.monotonic()
        request = ModelRequest("nowhere", LENGTH, threads=threads)
        with pytest.raises(LongRopeError, match=lack), open_scorer(request, {}, PoolRequest(workers, gpus, address)):
            pass
        assert time.monotonic() - began < 20

    def test_a_model_that_cannot_be_loaded(self, address: str) -> None:
        """The worker's own sentence comes out."""
        request = ModelRequest("/nowhere", LENGTH)
        with (
            pytest.raises(LongRopeError, match=r"^There is no model folder /nowhere"),
            open_scorer(request, TOKENS, PoolRequest(1, 0, address)),
        ):
            pass

    @pytest.mark.slow
    def test_the_cluster_survives(self, pool: Pool, address: str) -> None:
        """It belongs to others: its node is there after a pool has left it."""
        import ray

        with pool(lambda *_: None) as scorer:
            list(scorer.evaluate(UNITS[:2]))
        ray.init(address=address, log_to_driver=False)
        try:
            assert [node["Alive"] for node in ray.nodes()] == [True]
            deadline = time.monotonic() + 30
            while ray.available_resources().get("CPU") != 2:  # the pool's workers let go
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            ray.shutdown()


def keys(outcomes: Iterable[Outcome]) -> list[str]:
    return sorted(outcome.key for outcome in outcomes)


class TestSpareWork:
    """Two workers, and evaluations of half a second but for one."""

    LONG = Unit("999", FACTORS[0], Document("long", "9" * 64, 10 * LENGTH))

    @pytest.fixture
    def scorer(self, pool: Pool) -> Iterator[RayScorer]:
        """It has learnt how long an evaluation takes."""

        def take_a_while(_tally: Tally, key: str) -> None:
            if key == "101":
                raise RuntimeError("overflow")
            time.sleep(2.0 if key == "100" else 0.5)

        with pool(take_a_while) as scorer:
            list(scorer.evaluate(UNITS[:2]))
            yield scorer

    def test_an_idle_worker_takes_what_fits(self, scorer: RayScorer, tally: Tally) -> None:
        """Not what takes longer than the units that all wait for, and nothing that is computed or under way."""
        spare = [self.LONG, UNITS[0], UNITS[2], UNITS[5]]
        outcomes = [*scorer.evaluate(UNITS[2:5], spare), *scorer.drain()]
        assert keys(outcomes) == keys_of(UNITS[2:6])
        assert tally.of(self.LONG.key) == 0
        assert [tally.of(unit.key) for unit in UNITS[:6]] == [1] * 6
        assert list(scorer.evaluate([])) == []

    def test_nobody_waits_for_it(self, scorer: RayScorer, tally: Tally) -> None:
        """The call ends; a later one that asks for it gets it, without a second computation."""
        slow = UNITS[20]
        assert slow.key == "100"
        assert keys(scorer.evaluate(UNITS[2:5], [slow])) == keys_of(UNITS[2:5])
        assert tally.of(slow.key) == 1
        assert keys(scorer.evaluate([slow, UNITS[5]], [slow])) == keys_of([slow, UNITS[5]])
        assert tally.of(slow.key) == 1

    def test_a_later_call_hands_it_over_unasked(self, scorer: RayScorer) -> None:
        slow = UNITS[20]
        list(scorer.evaluate(UNITS[2:5], [slow]))
        time.sleep(2.0)
        assert keys(scorer.evaluate([])) == [slow.key]

    @pytest.mark.slow
    def test_its_failure_is_nobody_s(self, scorer: RayScorer, tally: Tally) -> None:
        """No outcome and no second attempt, until somebody asks for it."""
        bad = UNITS[21]
        assert bad.key == "101"
        seen = [*scorer.evaluate(UNITS[2:5], [bad]), *scorer.drain(), *scorer.evaluate(UNITS[5:10], [bad])]
        assert keys(seen) == keys_of(UNITS[2:10])
        assert tally.of(bad.key) == 1
        assert values(list(scorer.evaluate([bad]))) == {bad.key: (None, 0, "overflow (3 attempts)")}


def keys_of(units: Iterable[Unit]) -> list[str]:
    return sorted(unit.key for unit in units)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "localhost:99999", "nonsense", ""])
def test_nobody_at_that_address(address: str) -> None:
    """Within seconds: Ray by itself would try for a quarter of an hour."""
    began = time.monotonic()
    with (
        pytest.raises(LongRopeError, match="No Ray cluster could be joined") as refused,
        open_scorer(ModelRequest("nowhere", LENGTH), {}, PoolRequest(1, 0, address)),
    ):
        pass
    assert "\n" not in str(refused.value)
    assert time.monotonic() - began < 30


class TestAlone:
    """A cluster of one's own, for each of these."""

    def test_a_gpu_that_is_not_there(self) -> None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is one")
        with (
            pytest.raises(LongRopeError, match=r"1 workers of 1 GPUs, .* has 0 GPUs"),
            open_scorer(ModelRequest("nowhere", LENGTH), {}, PoolRequest(1, 1)),
        ):
            pass
        import ray

        assert not ray.is_initialized()

    @pytest.mark.slow
    def test_more_threads_than_cores(self, model: ModelRequest) -> None:
        """They share the cores there are; only a cluster of others has to have what is asked for."""
        request = replace(model, threads=(os.cpu_count() or 1) + 1)
        with open_scorer(request, TOKENS, PoolRequest(1, 0)) as scorer:
            outcomes = values(list(scorer.evaluate(UNITS[:2])))
        assert all(failure is None for _, _, failure in outcomes.values())

    @pytest.mark.slow
    def test_weights_are_read_once(
        self, model: ModelRequest, local: LocalScorer, expected: Any, tmp_path: Path
    ) -> None:
        """What starts later has them from the workers before it: the file is of no use by then."""
        folder = shutil.copytree(model.path, tmp_path / "model")
        with open_scorer(replace(model, path=str(folder)), TOKENS, PoolRequest(2, 0)) as scorer:
            assert not isinstance(scorer, LocalScorer)
            assert scorer.fingerprint == local.fingerprint
            (folder / "model.safetensors").write_bytes(b"")
            for pid in scorer.worker_pids():
                os.kill(pid, signal.SIGKILL)
            assert values(list(scorer.evaluate(UNITS))) == expected
