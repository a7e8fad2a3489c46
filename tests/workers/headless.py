"""A pool whose cluster loses its head: prints what it says. In a process of its own, since Ray may end that."""

from __future__ import annotations

import os
import secrets
import time
from typing import Any

os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}

import ray
from ray.cluster_utils import Cluster

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from searcher.study import Document, Outcome, Unit
from workers.model import ModelInfo, ModelRequest
from workers.pool import RayScorer
from workers.scorer import PoolRequest

UNITS = [Unit(str(n), Factors((1.0, 2.0), 0, 1.0), Document("text", "0" * 64, 64)) for n in range(1000)]


class Stub:
    def node(self) -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def share(self, _room: float) -> None: ...

    def start(self, *_: object) -> ModelInfo:
        return ModelInfo("weights", {}, RopeSpec(500.0, 4, 64, 2), None, "half-split")

    def score(self, unit: Unit) -> Outcome:
        time.sleep(0.5)
        return Outcome(unit.key, 1.0, 63, 0.5)


def create(_number: int) -> Any:
    return ray.remote(num_cpus=1, max_restarts=0)(Stub).remote()


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    scorer = RayScorer(ModelRequest("nowhere", 64), {}, PoolRequest(2, 0, cluster.address), create)
    try:
        for number, _ in enumerate(scorer.evaluate(UNITS)):
            if number == 3:
                cluster.head_node.all_processes["gcs_server"][0].process.kill()
    except LongRopeError as error:
        print(error, flush=True)
    finally:
        scorer.close()
        cluster.shutdown()


if __name__ == "__main__":
    main()
