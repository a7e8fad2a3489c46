"""Every way to search that the command offers, on a tiny random model: what it asks for, finds and says."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from searcher.plan import PRESETS
from searcher.samplers import SAMPLERS
from storage.factor_file import read
from storage.repository import Repository, ScoredCandidate

if TYPE_CHECKING:
    from conftest import Longrope

WINDOW, PAIRS, THETA = 64, 8, 500.0  # of the tiny Llama
SCALE, SU = 4.0, math.sqrt(1 + math.log(4) / math.log(WINDOW))
BATCH, GENERATIONS = 4, 2
# The smallest search with something in every place; what a test adds comes after, and holds.
TINY = f"""
    --population=8 --parents=4 --mutants=3 --crosses={BATCH - 3} --generations={GENERATIONS}
    --test-documents=1 --windows=search=1,selection=1,test=1 --no-racing
"""


@pytest.fixture(scope="module")
def tiny_search(small_study: list[str]) -> list[str]:
    """What follows ``launch``."""
    return [*without("racing", small_study), *TINY.split()]


@pytest.fixture(scope="module")
def unrefined(tiny_search: list[str]) -> list[str]:
    """The same, with no word on refinement."""
    return without("refine", tiny_search)


def without(word: str, arguments: list[str]) -> list[str]:
    """All but the options with this word in their names; a preset's name may hold it."""
    return [option for option in arguments if word not in option.partition("=")[0]]


def candidates(folder: Path, study: str) -> list[ScoredCandidate]:
    repository = Repository(f"sqlite:///{folder / 'longrope.db'}")
    try:
        return repository.generations(study)
    finally:
        repository.close()


def launched(longrope: Longrope, study: str, *arguments: str) -> dict[str, Any]:
    """What ``launch --json`` answers."""
    ended = longrope("launch", f"--study={study}", "--json", *arguments)
    assert ended.status == 0, ended.err
    answer: dict[str, Any] = json.loads(ended.out)
    return answer


def loss(row: ScoredCandidate) -> float:
    assert row.nll is not None
    return row.nll / row.tokens


def searched(rows: list[ScoredCandidate], generation: int) -> list[ScoredCandidate]:
    return [row for row in rows if (row.part, row.generation) == ("search", generation)]


class TestSamplers:
    @pytest.mark.parametrize("name", SAMPLERS)
    def test_it_proposes_in_evolutions_place(
        self, longrope: Longrope, unrefined: list[str], tmp_path: Path, name: str
    ) -> None:
        answer = launched(longrope, "sampled", *unrefined, f"--sampler={name}")
        rows = candidates(tmp_path, "sampled")
        assert answer["gradients"] == 0
        assert {row.part for row in rows} - {"search_short"} == {"search", "selection", "test", "short"}
        seeds = searched(rows, 0)
        assert len(seeds) == 8
        assert {"seed:pi", "seed:yarn"} <= {row.origin for row in seeds}
        for generation in range(1, 1 + GENERATIONS):
            origins = [row.origin for row in searched(rows, generation)]
            assert len(origins) == BATCH
            assert set(origins) <= {name, "mutant", "random"}
            assert name in origins
        every = [row.factors for row in rows if row.part == "search"]
        assert len(set(every)) == len(every)
        selected = [loss(row) for row in rows if (row.part, row.generation) == ("selection", 0)]
        assert answer["selection"]["searched"] == math.exp(min(selected))

    @pytest.mark.parametrize("name", ["cmaes", "tpe", "nsga2"])
    def test_it_goes_on_to_the_same_bytes(
        self, longrope: Longrope, unrefined: list[str], stop_after: Any, tmp_path: Path, name: str
    ) -> None:
        arguments = [*unrefined, f"--sampler={name}"]
        documents = 4 if name == "nsga2" else 2
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, documents * (8 + BATCH) + 3)  # within the second generation of its own
            assert longrope("launch", "--study=sampled", *arguments).status == 130
        assert longrope("resume", "sampled").status == 0
        (tmp_path / "undisturbed").mkdir()
        elsewhere = [f"--storage=sqlite:///{tmp_path}/undisturbed/longrope.db", "--out=undisturbed"]
        launched(longrope, "sampled", *arguments, *elsewhere)
        resumed, undisturbed = (folder / "sampled-factors.json" for folder in (tmp_path, tmp_path / "undisturbed"))
        assert resumed.read_bytes() == undisturbed.read_bytes()

    def test_what_it_found_can_be_refined_at_the_end(
        self, longrope: Longrope, tiny_search: list[str], tmp_path: Path
    ) -> None:
        assert launched(longrope, "sampled", *tiny_search, "--sampler=random-log")["gradients"] == 3
        parts = [row.part for row in candidates(tmp_path, "sampled")]
        order = [part for part, before in zip(parts, ["", *parts], strict=False) if part != before]
        assert order[:4] == ["search", "refine", "refined", "selection"]

    def test_long_against_short_context(self, longrope: Longrope, unrefined: list[str], tmp_path: Path) -> None:
        """The table is the front of all individuals, found here by comparing every two of them."""
        ended = longrope("launch", "--study=sampled", *unrefined, "--sampler=nsga2")
        rows = candidates(tmp_path, "sampled")
        short = {row.factors: loss(row) for row in rows if row.part == "search_short"}
        points = {row.factors: (loss(row), short[row.factors]) for row in rows if row.part == "search"}
        assert {row.documents for row in rows if row.part == "search_short"} == {2}
        front = sorted(
            point
            for point in points.values()
            if not any(
                other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points.values()
            )
        )
        result = json.loads(longrope("studies", "show", "sampled", "--json").out)["result"]
        assert [(row["long"], row["short"]) for row in result["pareto"]] == front
        shown = ended.out.partition("Long against short context")[2]
        lines = [[cell.strip() for cell in line.split("│")[1:3]] for line in shown.splitlines() if "│" in line]
        assert lines == [[f"{math.exp(value):.4f}" for value in point] for point in front]
        assert "Long against short context" in longrope("studies", "show", "sampled").out

    def test_other_searches_have_no_such_table(self, longrope: Longrope, tiny_search: list[str]) -> None:
        assert "Long against short" not in longrope("launch", "--study=plain", *tiny_search, "--generations=0").out


class TestRefinement:
    def test_steps_and_legs_are_those_asked_for(
        self, longrope: Longrope, tiny_search: list[str], tmp_path: Path
    ) -> None:
        refine = ["--refine-legs=2", "--refine-final-legs=1", "--refine-steps=2", "--refine-starts=2"]
        answer = launched(longrope, "refined", *tiny_search, *refine)
        rows = candidates(tmp_path, "refined")
        steps = [row for row in rows if row.part == "refine"]
        assert answer["gradients"] == len(steps) == 2 * (2 * 2 + 1)
        ends = [row for row in rows if row.origin.startswith("refined:")]
        legs = [[row for row in ends if row.generation == leg] for leg in sorted({row.generation for row in ends})]
        assert [len(leg) for leg in legs] == [2, 2, 1]
        assert all(row.part == "refined" and row.nll is not None for row in ends)
        # From the two best individuals so far, each from where it was scored.
        before = [row for row in rows[: rows.index(steps[0])] if row.nll is not None]
        best = sorted(before, key=loss)[:2]
        first = [row.factors for row in steps if row.generation == 0]
        assert [factors.n_hat for factors in first] == [row.factors.n_hat for row in best]
        for factors, row in zip(first, best, strict=True):
            assert factors.by_layer()[0] == pytest.approx(row.factors.by_layer()[0], rel=1e-12)
        assert [row.origin for row in legs[0]] == [f"refined:{row.origin}" for row in best]

    def test_the_paper_descends_nowhere(self, longrope: Longrope, unrefined: list[str], tmp_path: Path) -> None:
        answer = launched(longrope, "paper", *unrefined, "--preset=paper")
        assert PRESETS["paper"].refinement is None
        assert answer["gradients"] == 0
        assert {row.part for row in candidates(tmp_path, "paper")} == {"search", "selection", "test", "short"}

    def test_the_windows_it_descends_on(self, longrope: Longrope, tiny_search: list[str]) -> None:
        """Further windows of the search documents; the search windows themselves where none are wanted."""
        documents = {}
        for further in (1, 0):
            windows = f"--windows=search=1,refine={further},selection=1,test=1"
            launched(longrope, f"on{further}", *tiny_search, windows, "--generations=0")
            shown = json.loads(longrope("studies", "show", f"on{further}", "--json").out)
            documents[further] = shown["settings"]["documents"]
        assert documents[1]["search"] == documents[0]["search"] == documents[0]["refine"]
        assert len(set(documents[1]["refine"])) == 2
        others = {sha256 for part, found in documents[1].items() if part != "refine" for sha256 in found}
        assert set(documents[1]["refine"]).isdisjoint(others)

    def test_a_learnt_attention_factor_is_in_the_factor_file_as_itself(
        self, longrope: Longrope, tiny_search: list[str], tmp_path: Path
    ) -> None:
        """Not as ``su``: whoever worked the factor out from that policy would get another number."""
        learn = ["--learn-attention", "--refine-rate=0.3", "--n-hats=0", "--generations=0"]
        launched(longrope, "learnt", *tiny_search, *learn)
        launched(longrope, "fixed", *tiny_search, *learn[1:])
        (learnt,), (fixed,) = (read(tmp_path / f"{name}-factors.json").regimes for name in ("learnt", "fixed"))
        assert (fixed.attention_policy, fixed.factors.attention_factor) == ("su", pytest.approx(SU, rel=1e-15))
        assert abs(learnt.factors.attention_factor / SU - 1) > 0.01
        assert float(learnt.attention_policy) == learnt.factors.attention_factor
        origins = [row.origin for row in candidates(tmp_path, "learnt") if row.factors == learnt.factors]
        assert origins[0].startswith("refined:")
        assert longrope("export", "learnt", "--to=transformers-config", "--out=patch.json").status == 0
        patch = json.loads((tmp_path / "patch.json").read_text())
        assert patch["rope_parameters"]["attention_factor"] == learnt.factors.attention_factor


class TestRacing:
    # Many children, few places among the parents.
    CROWD = ("--preset=paper", "--parents=2", "--mutants=12", "--generations=3", "--search-documents=4")

    def test_it_saves_forwards_of_children_alone(
        self, longrope: Longrope, small_study: list[str], tmp_path: Path
    ) -> None:
        whole = launched(longrope, "whole", *without("racing", small_study), *self.CROWD, "--no-racing")
        ended = longrope("launch", "--study=raced", *small_study, *self.CROWD, "--racing", "--racing-caution=0")
        rows = candidates(tmp_path, "raced")
        left = [row for row in rows if row.dropped]
        children = [row for row in left if row.part == "search"]
        assert children
        assert all(row.generation > 0 for row in children)
        assert all(0 < row.scored < row.documents and row.nll is None for row in left)
        assert f"{len(left)} candidates raced out" in ended.out
        assert not any(row.dropped and row.part == "search" for row in candidates(tmp_path, "whole"))
        assert json.loads(longrope("studies", "show", "raced", "--json").out)["cost"]["forwards"] < whole["cost"]

    def test_a_cautious_race_leaves_nobody(self, longrope: Longrope, small_study: list[str], tmp_path: Path) -> None:
        launched(longrope, "raced", *small_study, *self.CROWD, "--racing", "--racing-caution=1e9")
        assert not any(row.dropped and row.part == "search" for row in candidates(tmp_path, "raced"))


class TestLongRope2:
    @pytest.mark.parametrize("choice", ["auto", "5"])
    def test_below_the_critical_pair_factors_follow_ntk(
        self, longrope: Longrope, tiny_search: list[str], tmp_path: Path, choice: str
    ) -> None:
        launched(longrope, "critical", *tiny_search, f"--critical-pair={choice}")
        critical = math.ceil(PAIRS * math.log(WINDOW / (2 * math.pi)) / math.log(THETA)) if choice == "auto" else 5
        assert 0 < critical < PAIRS
        rows = [row for row in candidates(tmp_path, "critical") if row.part in ("search", "refined", "selection")]
        rows = [row for row in rows if not row.origin.startswith("baseline:")]
        assert len({row.factors for row in rows}) > 8
        for row in rows:
            (lambdas,) = row.factors.by_layer()
            bound = lambdas[critical]
            assert lambdas[:critical] == tuple(round(bound ** (i / critical), 2) for i in range(critical))
            assert SCALE <= bound <= lambdas[-1] <= 2 * SCALE
            assert all(a <= b for a, b in pairwise(lambdas))

    def test_needles_alone_decide_and_plain_text_is_reported(
        self, longrope: Longrope, tiny_search: list[str], tmp_path: Path
    ) -> None:
        needles = 3
        launched(longrope, "planted", *tiny_search, f"--needles={needles}", "--generations=0")
        rows = candidates(tmp_path, "planted")
        digits = 4 * needles  # a token each, of a window
        assert {(row.part, row.tokens) for row in rows if not row.dropped} == {
            ("search", 2 * digits),
            ("refined", 2 * digits),
            ("refine", digits),
            ("selection", digits),
            ("test", 255),
            ("short", 63),
        }
        (regime,) = read(tmp_path / "planted-factors.json").regimes
        assert (regime.scores["selection"].tokens, regime.scores["test"].tokens) == (digits, 255)


class TestMemory:
    def test_where_weights_and_hidden_states_live_changes_no_bit(
        self, longrope: Longrope, tiny_search: list[str], tmp_path: Path
    ) -> None:
        """A chunk does change bits, so it is stated and stored; the perplexities stay what they are."""
        options = {
            "whole": [],
            "pieces": ["--chunk=48"],
            "host": ["--chunk=48", "--hidden-on-host"],
            "streamed": ["--chunk=48", "--hidden-on-host", "--stream-weights"],
        }
        files, answers = {}, {}
        for name, more in options.items():
            (tmp_path / name).mkdir()
            elsewhere = [f"--storage=sqlite:///{tmp_path / name}/longrope.db", f"--out={name}"]
            answers[name] = launched(longrope, "same", *tiny_search, "--generations=1", *elsewhere, *more)
            files[name] = (tmp_path / name / "same-factors.json").read_bytes()
        assert files["pieces"] == files["host"] == files["streamed"]
        assert answers["pieces"]["test"] == answers["streamed"]["test"]
        for method in ("none", "pi", "yarn"):
            assert answers["pieces"]["test"][method] == pytest.approx(answers["whole"]["test"][method], rel=1e-5)

    def test_evaluate_takes_them_too(self, longrope: Longrope, tiny_llama_folder: Path, text_folder: Path) -> None:
        arguments = ["evaluate", "--in-process", f"--model={tiny_llama_folder}", f"--data={text_folder / '1.txt'}"]
        arguments += ["--lengths=128,256", "--json"]
        plain, host = (
            json.loads(longrope(*arguments, *more).out)["perplexity"]
            for more in ([], ["--chunk=32", "--hidden-on-host", "--stream-weights"])
        )
        for method, by_length in plain.items():
            assert host[method] == pytest.approx(by_length, rel=1e-5)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_refined_ends_in_the_same_bytes_with_one_worker_and_with_three(
    longrope: Longrope, small_study: list[str], tmp_path: Path
) -> None:
    """Refinement before and after, racing, spare work of idle workers: nothing hangs on who computes what when."""
    arguments = [option for option in small_study if option != "--in-process"]
    options = {
        "alone": ["--in-process"],
        "one": ["--workers=1", "--gpus-per-worker=0"],
        "three": ["--workers=3", "--gpus-per-worker=0"],
    }
    files, rows = {}, {}
    for name, more in options.items():
        (tmp_path / name).mkdir()
        elsewhere = [f"--storage=sqlite:///{tmp_path / name}/longrope.db", f"--out={name}"]
        launched(longrope, "same", *arguments, *elsewhere, *more)
        files[name] = (tmp_path / name / "same-factors.json").read_bytes()
        rows[name] = candidates(tmp_path / name, "same")
    assert any(row.dropped for row in rows["alone"])
    assert {row.part for row in rows["alone"]} >= {"refine", "refined"}
    assert rows["one"] == rows["three"] == rows["alone"]
    assert files["one"] == files["three"] == files["alone"]
