"""What a report shows, gathered from the store; nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.extension import EVALUATE, FINETUNE, RECOVER, ExtensionPlan
from searcher.rope import Factors, RopeSpec
from searcher.second import TUNED
from storage.cost import Cost, TrajectoryPoint, trajectory
from storage.factor_file import ModelIdentity
from storage.measured import Measured
from storage.models import now
from storage.progress import RANKED, ScoredCandidate
from storage.report import TrainingLog
from storage.repository import Repository, StudyRecord
from storage.results import Result, factors_of
from storage.stages import StageRecord
from storage.timings import Timing

SHOWN_BASELINES = ("pi", "ntk", "yarn")  # of the rescale factors; all are in the table
SEED = "seed:"


@dataclass(frozen=True)
class SearchView:
    """One search, or one stage of an extension that searches.

    Attributes
    ----------
    name: of the stage; empty for a plain search.
    length: of its windows, in tokens.
    rows: its candidates in the order in which they were asked for.
    result: what it found; None until it is finished.
    """

    stage: int
    name: str
    kind: str
    length: int
    spec: RopeSpec
    rows: Sequence[ScoredCandidate]
    cost: Cost
    result: Result | None

    @property
    def scale(self) -> float:
        return self.spec.scale(self.length)

    def ranked(self) -> list[ScoredCandidate]:
        """The candidates with a score on all search documents."""
        return [row for row in self.rows if row.part in RANKED and row.nll is not None and row.tokens]

    def points(self) -> list[TrajectoryPoint]:
        """Cost against quality so far."""
        return trajectory(self.rows)

    def paid(self, point: TrajectoryPoint) -> float:
        """What a point had cost, in document forwards; gradient steps as forwards where their price is known."""
        return point.forwards + (self.cost.multiple or 1.0) * point.gradients

    def seeds(self) -> dict[str, float]:
        """Baseline -> its perplexity as a seed: on the search documents, on the grid, under the study's attention."""
        found: dict[str, float] = {}
        for row in self.ranked():
            name = row.origin.removeprefix(SEED)
            if row.origin.startswith(SEED) and (name in BASELINES or name == TUNED):
                found.setdefault(name, perplexity(row))
        return found

    def best(self) -> tuple[Factors, str] | None:
        """The factors to show, and what they are: the result's, or the best so far."""
        if self.result is not None:
            served = self.result.get("served", "searched")
            return factors_of(self.result, served), served
        points = self.points()
        return (points[-1].factors, "best so far") if points else None

    def compared(self) -> dict[str, Factors]:
        """The factors that the best is shown beside."""
        known = {} if self.result is None else self.result["factors"]
        if self.kind == RECOVER:
            return {TUNED: factors_of(self.result, TUNED)} if self.result is not None and TUNED in known else {}
        return {name: BASELINES[name](self.spec, self.scale) for name in SHOWN_BASELINES}


@dataclass(frozen=True)
class PageData:
    """A study as a report shows it.

    Attributes
    ----------
    searches: the search itself, or the stages of an extension that search and have begun.
    stages, logs, plan: of an extension; empty and None for a plain search.
    evaluations: beside the study's own.
    commands: lines to type that make the same study again.
    remarks: what these do not hold.
    plan_file: text of the plan file that the commands name; None where they name none.
    """

    record: StudyRecord
    identity: ModelIdentity
    length: int
    searches: Sequence[SearchView]
    timings: Sequence[Timing]
    rows: Sequence[ScoredCandidate]
    cost: Cost
    stages: Sequence[StageRecord] = ()
    logs: Mapping[int, TrainingLog] = field(default_factory=dict)
    plan: ExtensionPlan | None = None
    evaluations: Sequence[Measured] = ()
    commands: Sequence[str] = ()
    remarks: Sequence[str] = ()
    plan_file: str | None = None
    made_at: datetime = field(default_factory=now)

    def stage_name(self, stage: int) -> str:
        """A stage's name; empty in a plain search."""
        return self.plan.stages[stage].name if self.plan is not None else ""


def gather(
    repository: Repository,
    name: str,
    evaluations: Sequence[Measured] = (),
    commands: Sequence[str] = (),
    remarks: Sequence[str] = (),
    plan_file: str | None = None,
) -> PageData:
    """All that a report of a study shows, whatever has become of it so far.

    Parameters
    ----------
    evaluations, commands, remarks, plan_file: as in ``PageData``, which the store does not hold.

    Raises
    ------
    LongRopeError
        There is no study of this name, or it was not made by this program.
    """
    record = repository.study(name)
    rows, stages = repository.generations(name), repository.stages(name)
    if "identity" not in record.settings:
        raise LongRopeError(f"The study {name!r} states no model, so there is nothing to report of it.")
    identity = ModelIdentity(**record.settings["identity"])
    searches, plan = [], None
    if record.kind == "extension":
        plan = ExtensionPlan.from_json(record.settings["plan"])
        for stage in stages:
            planned = plan.stages[stage.stage]
            mine = [row for row in rows if row.stage == stage.stage]
            if planned.kind not in (FINETUNE, EVALUATE) and mine:
                cost = repository.cost(name, stage.stage)
                view = (stage.stage, planned.name, planned.kind, planned.length, identity.spec)
                searches.append(SearchView(*view, mine, cost, stage.result))
        length = max(stage.length for stage in plan.stages)
    else:
        length = int(record.settings["search"]["target_length"])
        view = (0, "", "search", length, identity.spec)
        searches.append(SearchView(*view, rows, repository.cost(name), record.result))
    logs = {stage.stage: repository.training_log(name, stage.stage) for stage in stages if stage.kind == FINETUNE}
    return PageData(
        record=record,
        identity=identity,
        length=length,
        searches=searches,
        timings=repository.timings(name),
        rows=rows,
        cost=repository.cost(name),
        stages=stages,
        logs={stage: log for stage, log in logs.items() if log},
        plan=plan,
        evaluations=evaluations,
        commands=commands,
        remarks=remarks,
        plan_file=plan_file,
    )


def perplexity(row: ScoredCandidate) -> float:
    """Of a candidate that has a score."""
    loss = (row.nll or 0.0) / row.tokens
    return math.exp(loss) if loss < 700 else math.inf
