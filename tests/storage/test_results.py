"""What a finished search leaves as JSON, and what is read from it again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from searcher.evolution import Evolution
from searcher.rope import Factors
from searcher.search import SearchPlan, SearchResult
from searcher.space import SearchSpace
from searcher.study import Candidate, Score
from storage.results import factors_of, pareto_front, perplexities, result_json

WINDOWS = {"search": (2, 32), "selection": (2, 32), "test": (2, 32), "short": (2, 4)}
PI = Factors((8.0, 8.0, 8.0))
WINNER = Candidate(Factors((1.0, 2.5, 7.25), 4, 1.25), "refined:seed:yarn")


def plan() -> SearchPlan:
    return SearchPlan(Evolution(), SearchSpace.for_scale(3, 8.0), 1.1, {"pi": PI}, {"pi": PI})


def result(**values: Any) -> SearchResult:
    scores = {"test": {"pi": Score(2.0, 62), "pi@study": Score(3.0, 62), "searched": Score(1.0, 62)}}
    given: dict[str, Any] = {"winner": WINNER, "without_n_hat": None, "scores": scores, "forwards": 9}
    return SearchResult(**(given | values))


def stored(found: SearchResult) -> Any:
    return json.loads(json.dumps(result_json(plan(), found, WINDOWS, {})))


def test_what_it_cost() -> None:
    assert {key: stored(result())[key] for key in ("forwards", "gradients", "dropped", "pareto")} == {
        "forwards": 9,
        "gradients": 0,
        "dropped": 0,
        "pareto": [],
    }
    found = stored(result(gradients=60, dropped=17))
    assert (found["gradients"], found["dropped"]) == (60, 17)


def test_the_front_comes_back_exactly() -> None:
    front = [
        (Candidate(Factors((1.0, 2.0, 0.1 + 0.2), 8, 1.1), "b"), 0.2, 0.1),
        (Candidate(Factors((1.0, 3.0, 4.0), 0, 1.1), "a"), 0.1, 1 / 3),
    ]
    found = pareto_front(stored(result(pareto=front)))
    assert found == [(long, short, candidate.factors) for candidate, long, short in reversed(front)]


def test_methods_come_back() -> None:
    found = stored(result())
    assert factors_of(found, "searched") == WINNER.factors
    assert factors_of(found, "pi") == PI
    assert perplexities(found, "test") == {"pi": math.exp(2 / 62), "searched": math.exp(1 / 62)}
    assert WINNER.factors.attention_factor != plan().attention_factor  # it was learnt
    assert perplexities(found, "test", True) == {"pi": math.exp(3 / 62)}
    kept = Candidate(replace(WINNER.factors, attention_factor=plan().attention_factor), "kept")
    at_study = perplexities(stored(result(winner=kept)), "test", True)
    assert at_study == {"pi": math.exp(3 / 62), "searched": math.exp(1 / 62)}
