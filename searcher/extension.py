"""A progressive extension as data: stages, and what each consumes and produces (LongRoPE, arXiv 2402.13753, 3.3).

    search(L1)  ->  fine-tune at L1  ->  search(L2) on the tuned model  ->  fine-tune at L2  ->  search(L3), not tuned
                ->  recover the short lengths with a smaller upper bound  ->  evaluate

A stage names the model it works on (``base``, or a fine-tuning stage) and, where it needs some, the factors (a stage,
or a baseline). Rescale factors are absolute throughout: against the model's unscaled RoPE, tuned or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from searcher.baselines import BASELINES
from searcher.errors import LongRopeError
from searcher.plan import SearchSettings
from searcher.rope import RopeSpec
from searcher.tuning import Tuning

SEARCH, FINETUNE, RECOVER, EVALUATE = "search", "finetune", "recover", "evaluate"
KINDS = (SEARCH, FINETUNE, RECOVER, EVALUATE)
MOST = 10_000  # windows, depths or trials of an evaluation
BASE = "base"  # the model as it came
MAIN = "main"  # the line of stages that the extension is; others are compared with it
STAGE_NAME = re.compile(r"\w[\w.+=@-]{0,79}")  # a stage keeps its files in a folder of its name


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation of an extension measures.

    Attributes
    ----------
    lengths: in tokens, ascending.
    windows: of a test document, at most.
    passkey_depths, passkey_trials: trials of every length are their product; 0 leaves the task out.
    key_value_trials: at each depth; 0 leaves the task out.
    baselines: rows beside the extension, of the model that is not tuned, each under its own attention factor.
    attention_factor: policy, or a number, that they are shown under once more.
    """

    lengths: tuple[int, ...]
    windows: int = 2
    passkey_depths: int = 5
    passkey_trials: int = 4
    key_value_trials: int = 7
    baselines: tuple[str, ...] = ("none", "pi", "ntk", "yarn")
    attention_factor: str = "su"

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise LongRopeError(f"Lengths to evaluate are ascending and distinct, not {list(self.lengths)}.")
        for name, least in (("windows", 1), ("passkey_depths", 0), ("passkey_trials", 0), ("key_value_trials", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
                raise LongRopeError(f"{name} of an evaluation is a whole number from {least} to {MOST}, not {value!r}.")
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise LongRopeError(f"A baseline is one of {', '.join(BASELINES)}, not {unknown[0]!r}.")


@dataclass(frozen=True)
class Stage:
    """One stage of an extension.

    Attributes
    ----------
    name: unique in its plan.
    kind: one of KINDS; the type of ``settings`` goes with it.
    length: of the windows that are searched, tuned or recovered at; the longest that is evaluated.
    model: ``base``, or the fine-tuning stage whose model it works on.
    factors: of a fine-tuning: a stage's name or a baseline's. Of a search: the stage whose factors, rescaled, join the
        seeds. Of a recovery: the stage whose factors the model was tuned at.
    line: ``main``, or the baseline whose tuning is compared with it.
    documents, windows: by part; see ``CorpusRequest``.
    outside: another trainer does the fine-tuning, and this one waits for its checkpoint.
    """

    name: str
    kind: str
    length: int
    settings: SearchSettings | Tuning | Evaluation
    model: str = BASE
    factors: str | None = None
    line: str = MAIN
    documents: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, int] = field(default_factory=dict)
    outside: bool = False

    @property
    def search(self) -> SearchSettings:
        """The settings of a search or a recovery."""
        assert isinstance(self.settings, SearchSettings)
        return self.settings

    @property
    def tuning(self) -> Tuning:
        """The settings of a fine-tuning."""
        assert isinstance(self.settings, Tuning)
        return self.settings

    @property
    def evaluation(self) -> Evaluation:
        """The settings of an evaluation."""
        assert isinstance(self.settings, Evaluation)
        return self.settings


@dataclass(frozen=True)
class ExtensionPlan:
    """A whole extension: its stages, in the order they are run.

    Raises
    ------
    LongRopeError
        A stage has another's name, or asks for a model or factors that no stage before it produces.
    """

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise LongRopeError(f"The plan {self.name} has no stages; it needs at least one [[stages]].")
        if len(self.of_kind(EVALUATE)) > 1:
            raise LongRopeError(f"The plan {self.name} evaluates more than once; name all lengths in one stage.")
        seen: dict[str, Stage] = {}
        for stage in self.stages:
            if not STAGE_NAME.fullmatch(stage.name):
                raise LongRopeError(
                    "A stage's name is a folder's: up to 80 letters, digits and any of . _ - + = @, the first of them "
                    f"a letter or digit, not {stage.name!r}."
                )
            if stage.name in (*seen, BASE, *BASELINES):
                raise LongRopeError(f"Two stages are named {stage.name!r}, or it means something else; give it a name.")
            if stage.model != BASE and (stage.model not in seen or seen[stage.model].kind != FINETUNE):
                raise LongRopeError(
                    f"The model of stage {stage.name} is {BASE} or a fine-tuning stage before it, not {stage.model!r}."
                )
            _check_factors(stage, seen)
            seen[stage.name] = stage

    def stage(self, name: str) -> Stage:
        """One stage by name."""
        return next(stage for stage in self.stages if stage.name == name)

    def of_kind(self, kind: str, line: str = MAIN) -> list[Stage]:
        """The stages of one kind and line, in order."""
        return [stage for stage in self.stages if stage.kind == kind and stage.line == line]

    def lines(self) -> list[str]:
        """``main``, and what is tuned for comparison, in order."""
        return list(dict.fromkeys([MAIN, *(stage.line for stage in self.stages)]))

    def final_model(self, line: str = MAIN) -> str:
        """The last tuned model of a line; ``base`` where nothing is tuned."""
        tuned = self.of_kind(FINETUNE, line)
        return tuned[-1].name if tuned else BASE

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` gives an equal object back."""
        stages = []
        for stage in self.stages:
            settings = asdict(stage.settings) if stage.kind == EVALUATE else stage.settings.to_json()  # type: ignore[union-attr]
            stages.append({**asdict(replace(stage, settings=Evaluation((1,)))), "settings": settings})
        return {"name": self.name, "stages": stages}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExtensionPlan:
        """The inverse of ``to_json``, also after lists came back for tuples."""
        return cls(data["name"], tuple(_stage_from_json(stage) for stage in data["stages"]))


def _check_factors(stage: Stage, seen: Mapping[str, Stage]) -> None:
    produced = {name for name, before in seen.items() if before.kind == SEARCH}
    if stage.kind == FINETUNE and stage.factors not in (*produced, *BASELINES):
        raise LongRopeError(
            f"The factors of the fine-tuning {stage.name} are a search stage before it or one of "
            f"{', '.join(BASELINES)}, not {stage.factors!r}."
        )
    if stage.kind == RECOVER and stage.factors not in produced:
        raise LongRopeError(
            f"The recovery {stage.name} starts from the factors of a search stage before it, not {stage.factors!r}."
        )
    if stage.kind == SEARCH and stage.factors is not None and stage.factors not in produced:
        raise LongRopeError(
            f"The seeds of {stage.name} come from a search stage before it, or from none, not {stage.factors!r}."
        )


def check_order(plan: ExtensionPlan) -> None:
    """Refuse stages whose result nothing would use, or that compare with less than there is.

    Raises
    ------
    LongRopeError
        A recovery of another model than the last tuned one, not below the length it was tuned at, or from other factors
        than it was tuned at; a comparison before the last fine-tuning.
    """
    last = plan.final_model()
    for stage in plan.of_kind(RECOVER):
        if stage.model == BASE or stage.model != last:
            served = "is tuned" if last == BASE else f"that is {last}"
            raise LongRopeError(
                f"The recovery {stage.name} works on {stage.model}, but only the last tuned model is served, and "
                f"{'none ' if last == BASE else ''}{served}; put it after the last fine-tuning."
            )
        tuned = plan.stage(last)
        if stage.length >= tuned.length:
            raise LongRopeError(
                f"The recovery {stage.name} is of {stage.length} tokens, but a recovery is of a length below the "
                f"{tuned.length} that {last} was tuned at; search at longer ones."
            )
        if stage.factors != tuned.factors:
            raise LongRopeError(
                f"The recovery {stage.name} starts from the factors of {stage.factors}, but {last} was tuned at those "
                f"of {tuned.factors}; leave factors out."
            )
    for line in plan.lines()[1:]:
        if len(plan.of_kind(FINETUNE, line)) < len(plan.of_kind(FINETUNE)):
            raise LongRopeError(
                f"The comparison with {line} repeats the fine-tunings before it, but {last} comes after it; put it "
                "after the last fine-tuning."
            )


def _stage_from_json(data: Mapping[str, Any]) -> Stage:
    values = {f.name: data[f.name] for f in fields(Stage) if f.name in data}
    given = data["settings"]
    if data["kind"] == EVALUATE:
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        values["settings"] = Evaluation(**plain)
    else:
        values["settings"] = (Tuning if data["kind"] == FINETUNE else SearchSettings).from_json(given)
    return Stage(**values)


def check_lengths(plan: ExtensionPlan, spec: RopeSpec) -> None:
    """Refuse lengths that a stage of its kind cannot have.

    Raises
    ------
    LongRopeError
        A search or a tuning within the original length, one under factors of a shorter length, or tunings that do not
        grow.
    """
    for stage in plan.stages:
        if stage.kind in (SEARCH, FINETUNE) and stage.length <= spec.original_length and stage.factors != "none":
            raise LongRopeError(
                f"Stage {stage.name} is of {stage.length} tokens, within the trained window of {spec.original_length}; "
                "give it a longer length."
            )
    lengths = {stage.name: stage.length for stage in plan.stages}
    for stage in plan.of_kind(FINETUNE):
        if lengths.get(str(stage.factors), stage.length) < stage.length:
            raise LongRopeError(
                f"The fine-tuning {stage.name} is for {stage.length} tokens, but its factors are those of "
                f"{stage.factors}, found for {lengths[str(stage.factors)]}; search at its length first."
            )
    for before, after in pairwise(plan.of_kind(FINETUNE)):
        if after.length < before.length:
            raise LongRopeError(
                f"Fine-tuning goes from shorter to longer: {after.name} of {after.length} tokens comes after "
                f"{before.name} of {before.length}."
            )
