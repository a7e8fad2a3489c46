"""What the papers report of a model at several lengths: perplexity in three ways, retrieval, tasks in free text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from searcher.errors import LongRopeError
from searcher.plan import ShippedAt
from searcher.rope import Factors, RopeSpec
from searcher.study import Document, Unit, evaluation_key
from storage.factor_file import FactorFile
from workers.accuracy import Answer, accuracy_table, effective_context
from workers.corpus import evaluation_documents, evaluation_windows, reference_test_paths
from workers.dataset import TokenArray, TokenisedDocument
from workers.evaluate import (
    OWN,
    Method,
    evaluate_methods,
    methods_at,
    perplexity_by_length,
    texts_at,
)
from workers.frames import JSON, KEY_VALUE, PASSKEY, TITLE
from workers.generation import score_title, title_trial
from workers.harness import harness_results
from workers.model import (
    LoadedModel,
    ModelRequest,
    load_model,
    load_tokenizer,
    read_original_length,
    resolve_folder,
    shipped_factors,
)
from workers.retrieval import (
    ANSWER_ROOM,
    PAPER_DEPTHS,
    PAPER_TRIALS,
    TooShort,
    Trial,
    make_trial,
    score_trial,
    tasks,
)
from workers.scorer import LocalScorer, PoolRequest, fit_chunk, open_scorer
from workers.sinks import Sinks, attention_sinks, refusal
from workers.sources import read_texts
from workers.summaries import read_questions, read_reports, score_questions, score_summaries

if TYPE_CHECKING:
    from workers.pool import RayScorer

PERPLEXITY, SLIDING = "perplexity", "sliding"
RETRIEVAL = (PASSKEY, KEY_VALUE, JSON)
MEASURES = (PERPLEXITY, SLIDING, *RETRIEVAL, TITLE)


@dataclass(frozen=True)
class EvaluationRequest:
    """What is asked for.

    Attributes
    ----------
    sources: text; empty for the reference model's test documents.
    lengths: in tokens, ascending.
    measures: of MEASURES. ``sliding`` is perplexity by single and by sliding window and by position, also with window
        attention and sinks, each method under its own attention factor and under ``policy``.
    windows: single windows of a document, at most; sliding ones, as many times SLIDES.
    stride: of sliding windows; None for the default of each length.
    sinks, cache: places of window attention's cache that hold the first tokens, and all its places, None for L0.
    paper: Position Interpolation's 32 distances x 10 trials in place of 5 depths x 4 trials.
    seed: of the trials.
    """

    model: ModelRequest
    sources: tuple[str, ...]
    text_column: str
    lengths: tuple[int, ...]
    measures: tuple[str, ...] = (PERPLEXITY,)
    windows: int = 2
    stride: int | None = None
    policy: str = "su"
    sinks: int = 4
    cache: int | None = None
    paper: bool = False
    seed: int = 0
    harness: tuple[str, ...] = ()
    reports: Path | None = None
    questions: Path | None = None

    def __post_init__(self) -> None:
        unknown = [measure for measure in self.measures if measure not in MEASURES]
        if unknown:
            raise LongRopeError(f"What can be measured is {', '.join(MEASURES)}, not {unknown[0]!r}.")


SLIDES = 4


def evaluate(
    request: EvaluationRequest, file: FactorFile | None, pool: PoolRequest | None, console: Console
) -> dict[str, Any]:
    """Measure what is asked for; plain values, by measure.

    Raises
    ------
    LongRopeError
        The model, the text or a length cannot be used.
    """
    evaluation = _Evaluation(request, file, console)
    found: dict[str, Any] = {"model": request.model.path, "lengths": list(request.lengths)}
    with_pool = [measure for measure in request.measures if measure in (PERPLEXITY, *RETRIEVAL)]
    if with_pool:
        found |= evaluation.on_workers(with_pool, pool)
    if set(request.measures) & {SLIDING, TITLE} or request.harness or request.reports or request.questions:
        found |= evaluation.here()
    return found


class _Evaluation:
    """One evaluation on its way."""

    def __init__(self, request: EvaluationRequest, file: FactorFile | None, console: Console) -> None:
        self.request, self.file, self.console = request, file, console
        model = request.model
        self.tokenizer = load_tokenizer(resolve_folder(model.path, model.trust_remote_code), model.trust_remote_code)
        self.regimes = [] if file is None else [(r.min_length, r.max_length, r.factors) for r in file.regimes]

    def note_other_weights(self, weights_sha256: str) -> None:
        if self.file is not None and self.file.model.weights_sha256 != weights_sha256:
            self.console.print(f"Note: the factor file was searched on other weights ({self.file.model.name}).")

    def shipped_at(self, spec: RopeSpec) -> ShippedAt:
        """What the model's own config scales by, by length."""
        model = self.request.model
        return lambda length: shipped_factors(model.path, spec, length, model.trust_remote_code)

    def methods(self, spec: RopeSpec, shipped: tuple[str, Factors] | None, length: int) -> list[Method]:
        """Every method at one length, window attention with sinks among them."""
        here = None
        if shipped is not None and (factors := self.shipped_at(spec)(length)) is not None:
            here = (shipped[0], factors)
        sinks = Sinks(self.request.cache or spec.original_length, self.request.sinks)
        return methods_at(spec, length, self.regimes, here, self.request.policy, sinks)

    def on_workers(self, measures: Sequence[str], pool: PoolRequest | None) -> dict[str, Any]:
        """Perplexity by single window, and retrieval whose answers are fixed."""
        request = self.request
        tokens: dict[str, TokenArray] = {}
        documents: dict[int, list[Document]] = {}
        if PERPLEXITY in measures:
            for length in request.lengths:
                windows = evaluation_windows(
                    request.sources, request.text_column, self.tokenizer, length, request.windows
                )
                documents[length] = [window.document for window in windows]
                tokens |= {window.document.sha256: window.tokens for window in windows}
        trials = {(k, n): self.trials(k, n) for k in RETRIEVAL if k in measures for n in request.lengths}
        tokens |= {trial.sha256: trial.tokens for found in trials.values() for trial in found}
        found: dict[str, Any] = {}
        with open_scorer(request.model, tokens, pool) as scorer:
            spec, shipped = scorer.info.spec, scorer.info.shipped
            if documents:
                found[PERPLEXITY] = perplexity_by_length(scorer, documents, self.regimes, self.shipped_at(spec))
                found["documents"] = {
                    length: {"windows": len(each), "tokens_scored": len(each) * (length - 1)}
                    for length, each in documents.items()
                }
            for (kind, length), asked in trials.items():
                methods = [m for m in self.methods(spec, shipped, length) if m.attention == OWN and m.sinks is None]
                right = _right(scorer, methods, asked)
                for method in methods:
                    rows = found.setdefault(kind, {}).setdefault(method.name, {})
                    rows[length] = _accuracy(asked, right[method.name])
            self.note_other_weights(scorer.info.weights_sha256)
        return found

    def here(self) -> dict[str, Any]:
        """What needs the model in this process: losses by token, attention sinks, free text."""
        request = self.request
        loaded = fit_chunk(load_model(request.model), request.model)
        found: dict[str, Any] = {}
        texts: Sequence[TokenisedDocument] = ()
        if {SLIDING, TITLE} & {*request.measures}:
            texts = evaluation_documents(request.sources, request.text_column, self.tokenizer)
        for length in request.lengths:
            methods = self.methods(loaded.spec, loaded.shipped, length)
            if SLIDING in request.measures:
                bos = self.tokenizer.bos_token_id
                asked = texts_at(texts, length, bos, request.windows, SLIDES * request.windows, request.stride)
                rows = [row.to_json() for row in evaluate_methods(loaded, asked, methods)]
                found.setdefault(SLIDING, []).extend(rows)
                self.with_sinks(loaded, methods, length, found)
            own = [m for m in methods if m.attention == OWN and m.sinks is None]
            if TITLE in request.measures:
                for method in own:
                    rows_of = found.setdefault(TITLE, {}).setdefault(method.name, {})
                    rows_of[length] = self.titles(loaded, method.factors, length)
            for method in own:
                found_here = self.free_text(loaded, method.factors, length)
                for name, value in found_here.items():
                    found.setdefault(name, {}).setdefault(method.name, {})[length] = value
        return found

    def with_sinks(self, loaded: LoadedModel, methods: Sequence[Method], length: int, found: dict[str, Any]) -> None:
        """Retrieval under window attention with sinks, where retrieval is asked for and the family can have them."""
        method = next((m for m in methods if m.sinks is not None and m.attention == OWN), None)
        if method is None or method.sinks is None or refusal(loaded) is not None:
            return
        for kind in RETRIEVAL:
            if kind in self.request.measures:
                trials = self.trials(kind, length)
                with attention_sinks(loaded, method.sinks, method.factors):
                    right = [score_trial(loaded, trial, None) for trial in trials]
                found.setdefault(f"{kind}_with_sinks", {})[length] = _accuracy(trials, right)

    def titles(self, loaded: LoadedModel, factors: Factors, length: int) -> dict[str, Any]:
        """How many documents' titles, their first lines, are in what the model writes."""
        request = self.request
        paths = request.sources or reference_test_paths()
        asked = right = 0
        for number, text in enumerate(read_texts(paths, request.text_column)):
            (task,) = tasks(TITLE, length, loaded.spec.original_length, request.seed, (0.0,), 1)
            with suppress(LongRopeError):  # too short a document, or none with a title
                trial = title_trial(replace(task, number=number), self.tokenizer, text.content)
                asked += 1
                right += score_title(loaded, trial, factors, self.tokenizer)
        return {"right": right, "trials": asked}

    def free_text(self, loaded: LoadedModel, factors: Factors, length: int) -> dict[str, Any]:
        """The extras: other people's tasks, and local data in their form."""
        request = self.request
        room = ANSWER_ROOM if length >= 2 * ANSWER_ROOM else length // 8
        found: dict[str, Any] = {}
        if request.harness:
            found["harness"] = harness_results(loaded, self.tokenizer, request.harness, length, factors)
        if request.reports is not None:
            reports = read_reports(request.reports)
            found["reports"] = asdict(score_summaries(loaded, self.tokenizer, reports, length, room, factors))
        if request.questions is not None:
            questions = read_questions(request.questions)
            found["questions"] = asdict(score_questions(loaded, self.tokenizer, questions, length, room, factors))
        return found

    def trials(self, kind: str, length: int) -> list[Trial]:
        """The trials of a retrieval task at one length; none where its prompt does not fit."""
        depths, count = (PAPER_DEPTHS, PAPER_TRIALS) if self.request.paper else (None, None)
        window = self.request.model.original_length or read_original_length(
            self.request.model.path, self.request.model.trust_remote_code
        )
        with suppress(TooShort):
            planned = tasks(kind, length, window, self.request.seed, depths, count)
            return [make_trial(task, self.tokenizer) for task in planned]
        return []


def _right(
    scorer: LocalScorer | RayScorer, methods: Sequence[Method], trials: Sequence[Trial]
) -> dict[str, list[bool]]:
    """By method, which of the trials came out right; methods that rotate alike are computed once."""
    keys = {
        method.name: [evaluation_key(scorer.fingerprint, method.factors, trial.document) for trial in trials]
        for method in methods
    }
    units = {
        key: Unit(key, method.factors, trial.document)
        for method in methods
        for key, trial in zip(keys[method.name], trials, strict=True)
    }
    wrong = {outcome.key: outcome for outcome in scorer.evaluate(list(units.values()))}
    failed = next((outcome.failure for outcome in wrong.values() if outcome.nll is None), None)
    if failed is not None:
        raise LongRopeError(f"Retrieval could not be scored: {failed}")
    return {name: [wrong[key].nll == 0 for key in mine] for name, mine in keys.items()}


def _accuracy(trials: Sequence[Trial], right: Sequence[bool]) -> dict[str, Any]:
    answers = [Answer(t.task, r, t.distance, t.chance) for t, r in zip(trials, right, strict=True)]
    return {"by_depth": [asdict(row) for row in accuracy_table(answers)], "k_max": effective_context(answers)}
