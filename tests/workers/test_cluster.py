"""A pool on a cluster of several nodes: nodes that go and come, workers that hang, run out of memory or are wrong."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from searcher.study import Document, Outcome, Unit
from workers.model import ModelInfo, ModelRequest
from workers.scorer import PoolRequest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from workers.pool import RayScorer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

LENGTH = 64
INFO = ModelInfo("weights", {"device": "this"}, RopeSpec(500.0, 16, LENGTH, 2), None, "half-split", probe=5.0)
FACTORS = [Factors((1.0, 1.0 + number), 0, 1.0) for number in range(12)]
UNITS = [Unit(f"{100 + i}", factors, Document("text", "0" * 64, LENGTH)) for i, factors in enumerate(FACTORS)]
RIGHT = {unit.key: float(unit.key) for unit in UNITS}
TOKENS = LENGTH - 1
LIMIT = 60.0  # seconds that every evaluation gets: nothing is late because the machine is slow
HANGING = 4.0  # where something is meant to hang
DEADLINE = 120.0  # seconds for what is bound to happen some time

Score = Callable[["Where", Unit], Outcome]


@dataclass(frozen=True)
class Where:
    """What a worker knows of itself: how many processes began before it, its node, and how often what happened."""

    process: int
    node: str
    folder: Path

    def count(self, name: str) -> int:
        """Once more; how often by now, over all processes."""
        with (self.folder / name).open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def until(self, name: str) -> None:
        """Wait until it has happened, in whichever process."""
        deadline = time.monotonic() + LIMIT / 2
        while not (self.folder / name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def right(unit: Unit, seconds: float = 0.01) -> Outcome:
    return Outcome(unit.key, float(unit.key), TOKENS, seconds)


@pytest.fixture(scope="module", autouse=True)
def _as_open_scorer_does() -> None:
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a busy machine starves them
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and one node of two: the head outlives all that happens to nodes here."""
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
    from ray.cluster_utils import Cluster

    register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()
    unregister_pickle_by_value(sys.modules[__name__])


@dataclass
class Crowd:
    """A pool of workers that do what a test wants."""

    scorer: RayScorer
    said: list[str]
    folder: Path

    def evaluate(self, units: Sequence[Unit] = UNITS) -> dict[str, float | None]:
        """All units; what the study would hold in the end."""
        kept: dict[str, float | None] = {}
        for outcome in self.scorer.evaluate(units):
            assert outcome.corrects == (outcome.key in kept)
            kept[outcome.key] = outcome.nll
        return kept

    def heard(self, *words: str) -> bool:
        return any(all(word in sentence for word in words) for sentence in self.said)

    def times(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_size if path.exists() else 0


Gather = Callable[..., Crowd]


@pytest.fixture
def gather(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gather]:
    """``gather(score, info=..., **pool)``: a pool on that cluster, its evaluations limited to LIMIT."""
    import ray

    import workers.crew
    from workers.pool import RayScorer

    opened: list[RayScorer] = []

    def gathered(score: Score, info: Callable[[Where], ModelInfo] = lambda _where: INFO, **pool: Any) -> Crowd:
        class Stub:
            def __init__(self) -> None:
                self.where: Where | None = None

            def node(self) -> str:
                node: str = ray.get_runtime_context().get_node_id()
                return node

            def share(self, _room: float) -> None: ...

            def start(self, *_: object) -> ModelInfo:
                if self.where is None:
                    where = Where(0, self.node(), tmp_path)
                    self.where = replace(where, process=where.count("processes"))
                return info(self.where)

            def score(self, unit: Unit) -> Outcome:
                assert self.where is not None
                return score(self.where, unit)

            def pid(self) -> int:
                return os.getpid()

        monkeypatch.setattr(
            workers.crew,
            "create_worker",
            lambda cpus, gpus: ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(
                Stub
            ).remote(),
        )
        said: list[str] = []
        request = PoolRequest(
            **{"workers": 2, "gpus_per_worker": 0, "time_limit": LIMIT, **pool}, ray_address=cluster.address
        )
        opened.append(RayScorer(ModelRequest("nowhere", LENGTH), {}, request, say=said.append))
        return Crowd(opened[-1], said, tmp_path)

    yield gathered
    for scorer in opened:
        scorer.close()


Leaving = Callable[..., AbstractContextManager[str]]
ANEW = "was lost while the workers started; they start anew without it"


@pytest.fixture
def leaving(cluster: Cluster, tmp_path: Path) -> Leaving:
    """``leaving(after=0.0, **node)``: a block with a node more, its id; it is lost so long after "there" counts."""

    @contextmanager
    def block(after: float = 0.0, **node: Any) -> Iterator[str]:
        extra = cluster.add_node(**node)
        cluster.wait_for_nodes()

        def leave() -> None:
            Where(0, "", tmp_path).until("there")
            time.sleep(after)
            cluster.remove_node(extra, allow_graceful=after > 0 or not node["num_cpus"])

        leaver = threading.Thread(target=leave)
        leaver.start()
        yield extra.node_id
        leaver.join()

    return block


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle workers look at every evaluation of the others."""
    import workers.pool

    monkeypatch.setattr(workers.pool, "AUDIT_EVERY", 1)


class TestNodes:
    def test_a_node_killed_and_one_that_joins(self, cluster: Cluster, gather: Gather) -> None:
        """Two places where no number was asked for; the new node's cores make more of them."""

        def slowly(where: Where, unit: Unit) -> Outcome:
            where.count(f"on {where.node}")
            time.sleep(0.4)
            return right(unit, 0.4)

        extra = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        crowd = gather(slowly, workers=None)
        outcomes = crowd.scorer.evaluate(UNITS)
        kept = {outcome.key: outcome.nll for outcome in (next(outcomes) for _ in range(3))}
        cluster.remove_node(extra, allow_graceful=False)
        added = cluster.add_node(num_cpus=2)
        try:
            for outcome in outcomes:
                assert outcome.key not in kept
                kept[outcome.key] = outcome.nll
            assert kept == RIGHT
            deadline = time.monotonic() + 120
            lost = "was lost; what its workers held is done again"  # which Ray may notice long after it was done
            while len({outcome.worker for outcome in crowd.scorer.evaluate(UNITS)}) < 4 or not crowd.heard(lost):
                assert time.monotonic() < deadline
        finally:
            cluster.remove_node(added, allow_graceful=False)
        assert crowd.heard("Joined the cluster", "workers more")
        assert crowd.times(f"on {added.node_id}") > 0
        assert crowd.evaluate() == RIGHT  # and again without it

    def test_a_node_killed_before_the_workers_start(self, cluster: Cluster, gather: Gather) -> None:
        """For seconds Ray counts a node that is gone; a worker that is to run there would never start."""
        cluster.remove_node(cluster.add_node(num_cpus=1), allow_graceful=False)
        crowd = gather(lambda _where, unit: right(unit), workers=None)
        assert crowd.heard(ANEW)
        assert crowd.evaluate() == RIGHT
        assert len(crowd.scorer.worker_pids()) == 2

    @pytest.mark.parametrize("workers", [None, 3])
    def test_a_node_killed_while_the_workers_start(self, gather: Gather, leaving: Leaving, workers: int | None) -> None:
        """As many as there is room for then, whatever was asked for."""

        def describe(where: Where) -> ModelInfo:
            if where.node == node_id:
                where.count("there")
                time.sleep(3600)
            return INFO

        with leaving(num_cpus=1) as node_id:
            crowd = gather(lambda _where, unit: right(unit), describe, workers=workers)
        assert crowd.heard(ANEW)
        assert crowd.evaluate() == RIGHT
        assert len(crowd.scorer.worker_pids()) == 2

    def test_a_machine_that_ends_its_workers_and_then_leaves(self, gather: Gather, leaving: Leaving) -> None:
        def describe(where: Where) -> ModelInfo:
            if where.node == node_id:
                where.count("there")
                os.kill(os.getpid(), signal.SIGKILL)
            return INFO

        with leaving(num_cpus=1, after=2.0) as node_id:
            crowd = gather(lambda _where, unit: right(unit), describe, workers=None)
        assert crowd.heard(ANEW)
        assert crowd.evaluate() == RIGHT

    def test_a_node_without_workers_leaves_while_they_start(self, gather: Gather, leaving: Leaving) -> None:
        """What was loaded by then stays."""

        def describe(where: Where) -> ModelInfo:
            where.count("there")
            time.sleep(10.0)
            return INFO

        with leaving(num_cpus=0):
            crowd = gather(lambda _where, unit: right(unit), describe)
        assert crowd.evaluate() == RIGHT
        assert not crowd.heard(ANEW)
        assert crowd.times("processes") == 2

    def test_the_only_gpu_is_lost_while_the_workers_start(self, gather: Gather, leaving: Leaving) -> None:
        """A study is not moved to CPUs without a word: its losses would be others."""

        def describe(where: Where) -> ModelInfo:
            where.count("there")
            time.sleep(3600)
            return INFO

        with (
            leaving(num_cpus=1, num_gpus=1),
            pytest.raises(LongRopeError, match=r"1 workers of 1 GPUs, 1 CPUs each were asked for.*room for 0"),
        ):
            gather(lambda _where, unit: right(unit), describe, workers=None, gpus_per_worker=None)

    def test_no_more_workers_than_were_asked_for(self, cluster: Cluster, gather: Gather) -> None:
        crowd = gather(lambda _where, unit: right(unit), workers=2)
        added = cluster.add_node(num_cpus=2)
        try:
            deadline = time.monotonic() + 120
            while not crowd.heard("Joined the cluster", "0 workers more"):
                assert time.monotonic() < deadline
                assert crowd.evaluate() == RIGHT
            assert len(crowd.scorer.worker_pids()) == 2
        finally:
            cluster.remove_node(added, allow_graceful=False)


class TestHanging:
    def test_a_worker_that_hangs_once(self, gather: Gather) -> None:
        def hang(where: Where, unit: Unit) -> Outcome:
            if unit.key == "105" and where.count("hangs") == 1:
                time.sleep(3600)
            return right(unit)

        crowd = gather(hang, time_limit=HANGING)
        assert crowd.evaluate() == RIGHT
        assert crowd.heard("it had not ended after 4 s")

    def test_a_stopped_process(self, gather: Gather) -> None:
        """One that does not even answer Ray."""

        def stop(where: Where, unit: Unit) -> Outcome:
            if unit.key == "105" and where.count("stops") == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            return right(unit)

        crowd = gather(stop, time_limit=HANGING)
        assert crowd.evaluate() == RIGHT
        assert len(crowd.scorer.worker_pids()) == 2

    def test_a_unit_that_hangs_everywhere(self, gather: Gather) -> None:
        """Three workers, then a failure to be stored with the reason."""

        def hang(where: Where, unit: Unit) -> Outcome:
            if unit.key == "105":
                where.count("hangs")
                time.sleep(3600)
            return right(unit)

        crowd = gather(hang, time_limit=HANGING)
        outcomes = {outcome.key: outcome for outcome in crowd.scorer.evaluate(UNITS)}
        assert outcomes.pop("105").failure == "it had not ended after 4 s (3 attempts)"
        assert {key: outcome.nll for key, outcome in outcomes.items()} == {k: v for k, v in RIGHT.items() if k != "105"}
        assert 1 <= crowd.times("hangs") <= 3  # a slow machine may not have begun it when its time was up

    def test_what_took_long_before_may_take_long(self, gather: Gather) -> None:
        """The limit is ten times what was measured, not the one that was asked for."""

        def slowly(_where: Where, unit: Unit) -> Outcome:
            seconds = 9.0 if unit.key == "200" else 2.0  # the first ones have an hour: nothing was measured
            time.sleep(seconds)
            return right(unit, seconds)

        crowd = gather(slowly, time_limit=HANGING)
        last = [replace(UNITS[0], key="200")]
        assert crowd.evaluate(UNITS[:2]) == {unit.key: RIGHT[unit.key] for unit in UNITS[:2]}
        assert crowd.evaluate(last) == {"200": 200.0}
        assert crowd.said == []


class TestMemory:
    @pytest.mark.parametrize("how", ["killed", "raised"])
    def test_out_of_memory(self, gather: Gather, how: str) -> None:
        """Twice, then there is enough; said with the reason."""

        def exhaust(where: Where, unit: Unit) -> Outcome:
            if unit.key == "105" and where.count("deaths") <= 2:
                if how == "raised":
                    raise MemoryError
                os.kill(os.getpid(), signal.SIGKILL)
            return right(unit)

        crowd = gather(exhaust)
        assert crowd.evaluate() == RIGHT
        assert crowd.times("deaths") == 3
        assert crowd.heard("the worker died" if how == "killed" else "MemoryError")

    def test_ray_s_own_word_for_it(self) -> None:
        from ray.exceptions import ActorDiedError, OutOfMemoryError

        from workers.actor import cause_of_death

        assert cause_of_death(OutOfMemoryError("the node is low")) == "its node ran out of memory and Ray ended it"
        assert cause_of_death(ActorDiedError()) == "the worker died"


class TestGarbage:
    @pytest.mark.parametrize("kind", ["nothing", "tokens", "key"])
    def test_it_is_never_kept(self, gather: Gather, kind: str) -> None:
        """And its worker's other values of this call are computed again, by others."""

        def spoil(where: Where, unit: Unit) -> Any:
            if where.process == 1 and where.count("scored") == 3:
                where.count("spoilt")
                good = right(unit)
                return {"nothing": None, "tokens": replace(good, tokens=7), "key": replace(good, key="?")}[kind]
            if where.process != 1:
                where.until("spoilt")
            return right(unit)

        crowd = gather(spoil)
        assert crowd.evaluate() == RIGHT
        assert crowd.heard("is replaced: it returned")

    def test_not_a_number_where_another_finds_one(self, gather: Gather) -> None:
        """A third decides; the worker is set aside, and with it what it gave before."""

        def spoil(where: Where, unit: Unit) -> Outcome:
            if where.process != 1:
                where.until("spoilt")
            elif where.count("scored") >= 3:
                where.count("spoilt")
                return replace(right(unit), nll=math.nan, failure="the loss on text is nan")
            return right(unit)

        crowd = gather(spoil)
        assert crowd.evaluate() == RIGHT
        assert crowd.heard("it gave another value than two others on text")  # maybe of one that was replaced already

    def test_a_candidate_that_overflows(self, gather: Gather) -> None:
        """Two workers find it so: it is kept as it is, and nobody is to blame."""

        def overflow(where: Where, unit: Unit) -> Outcome:
            if unit.key == "105":
                where.count("overflows")
                return replace(right(unit), nll=math.inf, failure="the loss on text is inf")
            return right(unit)

        crowd = gather(overflow)
        assert crowd.evaluate() == {**RIGHT, "105": math.inf}
        assert crowd.times("overflows") == 2
        assert crowd.said == []

    def test_a_single_worker_is_asked_twice(self, gather: Gather) -> None:
        def overflow(where: Where, unit: Unit) -> Outcome:
            if unit.key == "105":
                where.count("overflows")
                return replace(right(unit), nll=math.inf, failure="the loss on text is inf")
            return right(unit)

        crowd = gather(overflow, workers=1)
        assert crowd.evaluate() == {**RIGHT, "105": math.inf}
        assert crowd.times("overflows") == 2


class TestWrongValues:
    @pytest.mark.usefixtures("audited")
    def test_a_worker_that_goes_wrong_is_found_and_what_it_gave_is_corrected(self, gather: Gather) -> None:
        """From its third evaluation on all are wrong, and look right."""

        def err(where: Where, unit: Unit) -> Outcome:
            wrong = where.process == 1 and where.count("scored") >= 3
            time.sleep(1.0)
            return replace(right(unit, 1.0), nll=float(unit.key) + wrong * 2**-40)

        crowd = gather(err)
        deadline, call = time.monotonic() + DEADLINE, 0
        while not crowd.heard("it gave another value than two others"):
            assert time.monotonic() < deadline
            call += 1
            # Three units for two workers: one that is done soon enough has time to look at the other's.
            units = [replace(unit, key=f"{call}{unit.key}") for unit in UNITS[:3]]
            kept = crowd.evaluate(units)
        assert kept == {unit.key: float(unit.key) for unit in units}

    def test_workers_that_disagree_from_the_start(self, gather: Gather) -> None:
        """One against one: nobody knows who is right."""
        with pytest.raises(LongRopeError, match="2 different losses of the same short text"):
            gather(lambda _where, unit: right(unit), lambda where: replace(INFO, probe=float(where.process)))

    def test_one_of_three_is_wrong_from_the_start(self, cluster: Cluster, gather: Gather) -> None:
        added = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        try:
            crowd = gather(
                lambda _where, unit: right(unit),
                lambda where: replace(INFO, probe=6.0 if where.process == 2 else 5.0),
                workers=3,
            )
            assert crowd.scorer.info.probe == 5.0
            assert crowd.heard("it gave another loss of a known text than the others")
            assert crowd.evaluate() == RIGHT
        finally:
            cluster.remove_node(added, allow_graceful=False)

    def test_a_replacement_that_is_wrong_computes_nothing(self, gather: Gather) -> None:
        """Until its own replacement is right."""

        def die(where: Where, unit: Unit) -> Outcome:
            where.count(f"by {where.process}")
            if where.count("scored") == 3:
                os._exit(1)
            time.sleep(0.2)
            return right(unit)

        crowd = gather(die, lambda where: replace(INFO, probe=6.0 if where.process == 3 else 5.0))
        deadline = time.monotonic() + DEADLINE
        while not crowd.heard("it gave another loss of a known text than the others"):
            assert time.monotonic() < deadline
            assert crowd.evaluate() == RIGHT
        assert crowd.heard("it gave another loss of a known text than the others")
        assert crowd.times("by 3") == 0


def test_the_code_travels(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a node that was started elsewhere and is told no path to it."""
    import ray

    from workers.actor import join_cluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    node = cluster.add_node(num_cpus=1, resources={"elsewhere": 1})
    join_cluster(cluster.address)
    try:

        @ray.remote(resources={"elsewhere": 1})
        def look() -> tuple[str, str, str, list[str]]:
            import searcher
            import workers.actor

            room = Path(workers.actor.__file__).parent
            files = [path.name for path in room.rglob("*")]
            return os.environ.get("RAY_NODE_ID", ""), str(room), str(Path(str(searcher.__file__)).parent), files

        _, workers_at, searcher_at, files = ray.get(look.remote(), timeout=120)
    finally:
        ray.shutdown()
        cluster.remove_node(node, allow_graceful=False)
    here = Path(__file__).parent.parent.parent
    assert not Path(workers_at).is_relative_to(here)
    assert "runtime_resources" in workers_at
    assert "runtime_resources" in searcher_at
    assert {path.name for path in (here / "workers").glob("*.py")} <= set(files)
    assert "model.safetensors" not in files


@pytest.mark.parametrize("token", ["", "b" * 64])
def test_without_its_token_a_cluster_stays_closed(cluster: Cluster, tmp_path: Path, token: str) -> None:
    script = f"from workers.actor import join_cluster\njoin_cluster({cluster.address!r})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, **mode, "PYTHONPATH": root, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    assert f"No Ray cluster could be joined at {cluster.address}" in done.stderr


def test_the_head_is_gone(tmp_path: Path) -> None:
    """Ray by itself ends the process after a minute; this says in time what to do."""
    script = Path(__file__).with_name("headless.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = str(Path(__file__).parent.parent.parent)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, script], env={**environment, "PYTHONPATH": root}, cwd=tmp_path, capture_output=True, text=True
    )
    assert "The head of the Ray cluster at 127.0.0.1:" in done.stdout, done.stderr
    assert "go on with longrope resume" in done.stdout
    assert time.monotonic() - began < 150
