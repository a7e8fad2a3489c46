"""What a finished search leaves: as JSON in the store, as a factor file, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from searcher.errors import LongRopeError
from searcher.plan import SearchSettings
from searcher.rope import Factors
from searcher.search import SearchPlan, SearchResult
from searcher.study import AT_STUDY_ATTENTION, SHORT, WITHOUT_N_HAT, Score
from storage.factor_file import FactorFile, ModelIdentity, Regime, RegimeScore, WithoutNHat

Result = dict[str, Any]


def result_json(
    plan: SearchPlan,
    result: SearchResult,
    windows: Mapping[str, tuple[int, int]],
    computed_by: Mapping[str, object],
) -> Result:
    """A search's result as plain values.

    Parameters
    ----------
    windows: part -> (number of windows, tokens of each).
    computed_by: software versions and kernels.
    """
    rows = dict(plan.baselines)
    rows["searched"] = result.winner.factors
    if result.without_n_hat is not None:
        rows[WITHOUT_N_HAT] = result.without_n_hat.factors
    return {
        "factors": {name: asdict(factors) for name, factors in rows.items()},
        "scores": {
            part: {
                name: {
                    "nll": score.nll if math.isfinite(score.nll) else None,
                    "tokens": score.tokens,
                    "failure": score.failure,
                }
                for name, score in table.items()
            }
            for part, table in result.scores.items()
        },
        "windows": {part: list(size) for part, size in windows.items()},
        "origin": result.winner.origin,
        "scale": windows["search"][1] / windows[SHORT][1],
        "attention_factor": plan.attention_factor,
        "forwards": result.forwards,
        "gradients": result.gradients,
        "dropped": result.dropped,
        "pareto": [
            {"factors": asdict(candidate.factors), "long": long, "short": short}
            for candidate, long, short in result.pareto
        ],
        "computed_by": dict(computed_by),
        "history": list(result.history),
    }


def scores(result: Result, part: str) -> dict[str, Score]:
    """Method -> score on one part; methods under the study's attention factor end in ``@study``."""
    return {
        name: Score(float(row["nll"]) if row["nll"] is not None else float("inf"), row["tokens"], row["failure"])
        for name, row in result["scores"][part].items()
    }


def perplexities(result: Result, part: str, at_study_attention: bool = False) -> dict[str, float]:
    """Method -> perplexity on one part, each under its own attention factor or each under the study's.

    Where a method was not scored under the study's, it is left out; so are searched factors with one that was learnt.
    """
    table = scores(result, part)
    methods = [name for name in table if not name.endswith(AT_STUDY_ATTENTION)]
    if not at_study_attention:
        return {name: table[name].perplexity for name in methods}
    study = result["attention_factor"]
    is_studys = {name: factors_of(result, name).attention_factor == study for name in methods}
    at_study = {name: name + AT_STUDY_ATTENTION for name in methods if not name.startswith("searched")}
    at_study |= {name: name for name in methods if name.startswith("searched") and is_studys[name]}
    return {name: table[row].perplexity for name, row in at_study.items() if row in table}


def factors_of(result: Result, method: str) -> Factors:
    """The factors of a method of the result's tables.

    Raises
    ------
    LongRopeError
        No such method.
    """
    if method not in result["factors"]:
        known = ", ".join(result["factors"])
        raise LongRopeError(f"The study has no factors for {method!r}; it has {known}.")
    return _factors(result["factors"][method])


def pareto_front(result: Result) -> list[tuple[float, float, Factors]]:
    """Loss at the target length, loss on short documents, factors: the best at the target length first.

    Empty where the search had one objective, as all had that were finished before there were two.
    """
    front = [(row["long"], row["short"], _factors(row["factors"])) for row in result.get("pareto", [])]
    return sorted(front, key=lambda row: row[:2])


def _factors(row: Mapping[str, Any]) -> Factors:
    return Factors(tuple(row["lambdas"]), int(row["n_hat"]), float(row["attention_factor"]))


def factor_file(
    model: ModelIdentity,
    settings: SearchSettings,
    result: Result,
    provenance: Mapping[str, object],
    method: str = "searched",
) -> FactorFile:
    """The factor file of a study: one regime, from just above the original length to the target.

    Parameters
    ----------
    method: ``searched``, or a baseline's name.
    provenance: see ``FactorFile``.
    """
    factors = factors_of(result, method)
    alternative = None
    if method == "searched" and factors.n_hat > 0 and WITHOUT_N_HAT in result["factors"]:
        alternative = WithoutNHat(factors_of(result, WITHOUT_N_HAT), regime_scores(result, WITHOUT_N_HAT))
    # A baseline's own attention factor, or one that was learnt, is a number here, not the study's policy.
    is_study = method == "searched" and factors.attention_factor == result["attention_factor"]
    policy = settings.attention if is_study else repr(factors.attention_factor)
    regime = Regime(
        min_length=model.original_length + 1,
        max_length=settings.target_length,
        factors=factors,
        attention_policy=policy,
        scores=regime_scores(result, method),
        without_n_hat=alternative,
    )
    return FactorFile(model, (regime,), provenance)


def regime_scores(result: Result, method: str) -> dict[str, RegimeScore]:
    """Part -> what a factor file says of a method's score there; parts that it failed on are left out."""
    found = {}
    for part in result["scores"]:
        score = scores(result, part).get(method)
        if score is not None and score.failure is None:
            count, length = result["windows"][part]
            found[part] = RegimeScore(score.perplexity, score.tokens, count, length)
    return found
