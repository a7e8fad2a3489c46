"""The critical pair against the paper's figures and a plain loop; NTK below it is RoPE of a larger base."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher.baselines import BASELINES
from searcher.critical import critical_pair, ntk_below, practical_pair
from searcher.errors import LongRopeError
from searcher.evolution import Evolution, State, ask, tell
from searcher.operators import MUTATIONS
from searcher.rope import RopeSpec
from searcher.space import GRID, Individual, SearchSpace

LLAMA3 = RopeSpec(500_000.0, 128, 8192, 32)
PHI3_MINI = RopeSpec(10_000.0, 96, 2048, 32, "phi3")
REFERENCE = RopeSpec(10_000.0, 64, 256, 4)
SPECS = st.builds(
    RopeSpec,
    st.floats(100.0, 1e8),
    st.integers(3, 128).map(lambda pairs: 2 * pairs),
    st.integers(2, 2**20),
    st.just(2),
)


@pytest.mark.parametrize(("spec", "index"), [(LLAMA3, 35), (PHI3_MINI, 31), (REFERENCE, 13)])
def test_the_critical_pair_is_the_papers(spec: RopeSpec, index: int) -> None:
    """The figures of arXiv 2502.20082 for the first two; 32 ln(256 / 2 pi) / ln 10 000 = 12.88 for the last."""
    assert critical_pair(spec) == index


@given(SPECS)
@settings(deadline=None)
def test_the_critical_pair_is_the_first_that_does_not_turn_once_in_the_trained_window(spec: RopeSpec) -> None:
    turns = spec.original_length * spec.inverse_frequencies() / (2 * math.pi)
    index = critical_pair(spec)
    assert 0 <= index < spec.pairs
    assert np.all(turns[:index] > 1 - 1e-9)
    if index < spec.pairs - 1:
        assert np.all(turns[index:] < 1 + 1e-9)


@given(SPECS, st.floats(1.0, 64.0), st.data())
@settings(deadline=None)
def test_below_the_critical_pair_is_rope_of_a_larger_base(spec: RopeSpec, value: float, data: st.DataObject) -> None:
    critical = data.draw(st.integers((spec.pairs + 3) // 4, spec.pairs - 1))  # lower ones overflow the base
    larger = RopeSpec(
        spec.theta * value ** (spec.rotary_dim / (2 * critical)), spec.rotary_dim, spec.original_length, 2
    )
    rescaled = spec.inverse_frequencies()[:critical] / ntk_below(value, critical)
    np.testing.assert_allclose(rescaled, larger.inverse_frequencies()[:critical], rtol=1e-9)
    at_the_border = larger.inverse_frequencies()[critical]
    np.testing.assert_allclose(at_the_border, spec.inverse_frequencies()[critical] / value, rtol=1e-9)


def test_a_user_asks_for_the_theoretical_pair_or_a_practical_one() -> None:
    assert practical_pair("auto", LLAMA3) == 35
    assert practical_pair("30", LLAMA3) == practical_pair(30, LLAMA3) == 30
    assert practical_pair(0, LLAMA3) == 0
    assert practical_pair("63", LLAMA3) == 63


@pytest.mark.parametrize("choice", ["64", -1, "Auto", "1.5", ""])
def test_what_is_no_pair_is_refused(choice: str | int) -> None:
    with pytest.raises(LongRopeError, match=r"auto \(35 for this model\) or a whole number from 0 to 63"):
        practical_pair(choice, LLAMA3)


@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("spec", [LLAMA3, REFERENCE])
def test_an_evolution_stays_in_the_critical_space_and_moves_every_searched_pair(kind: str, spec: RopeSpec) -> None:
    critical = critical_pair(spec)
    space = SearchSpace.for_critical(spec.pairs, 8.0, critical)
    seeds = {name: space.snap(make(spec, 8.0)) for name, make in BASELINES.items()}
    evolution = Evolution(population=24, parents=8, mutants=12, crosses=12, generations=3, mutation=kind)
    state = State()
    while children := ask(evolution, space, state, seeds, seed=0):
        assert all(child.individual in space for child in children)
        assert not {child.individual for child in children} & set(state.scores)
        # Larger factors are better, so that there is somewhere to go from PI.
        state = tell(state, {c.individual: -float(np.log(c.individual.steps).sum()) for c in children})
    assert len(state.scores) == evolution.individuals
    steps = np.asarray([individual.steps for individual in state.scores])
    assert np.all(np.ptp(steps[:, critical:], axis=0) > 0)
    assert np.all(steps[:, 0] == GRID)


def test_in_the_critical_space_pi_is_ntk_up_to_the_scale() -> None:
    spec = RopeSpec(10_000.0, 8, 256, 1)
    space = SearchSpace.for_critical(spec.pairs, 8.0, 2)
    assert space.snap(BASELINES["pi"](spec, 8.0)) == Individual((100, round(100 * 8**0.5), 800, 800), 0)
