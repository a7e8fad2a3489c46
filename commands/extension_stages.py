"""The stages of one extension, each from what those before it left in the store."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from commands.export import window_in_force
from commands.extension_text import SEARCHES, stage_windows, training_chunks
from commands.runs import search
from searcher.errors import LongRopeError
from searcher.extension import (
    BASE,
    EVALUATE,
    FINETUNE,
    RECOVER,
    Evaluation,
    Stage,
)
from searcher.regimes import Place, regimes, rows
from searcher.rope import Factors
from searcher.second import TUNED, attention_policy, recovered, stage_plan, tuning_factors
from searcher.study import WITHOUT_N_HAT, Candidate, Score, score_generation
from searcher.tuning import Tuning
from storage.config_forms import config_patch, form_room
from storage.factor_file import FactorFile, ModelIdentity, Regime, RegimeScore, WithoutNHat, write
from storage.live import TuningWatcher, Watcher
from storage.losses import LossError, take
from storage.results import factors_of, regime_scores, scores
from storage.stages import StageRecord
from storage.study_store import StudyStore
from workers.accuracy import Answer, accuracy_table, effective_context
from workers.checkpoints import Checkpoint
from workers.corpus import training_documents
from workers.finetune import UNFINISHED, TuneRequest, tune
from workers.frames import KEY_VALUE, PASSKEY
from workers.model import (
    ModelRequest,
    load_tokenizer,
    model_digest,
    read_config_json,
    resolve_folder,
    shipped_factors,
)
from workers.retrieval import TooShort, Trial, make_trial, tasks
from workers.scorer import open_scorer
from workers.settings import device_name, free_memory, settle_device
from workers.train_cluster import on_cluster, tune_on_cluster
from workers.tuned import check_tuned

if TYPE_CHECKING:
    from commands.extensions import Extension
    from workers.dataset import Window


class Driver:
    """The stages of one extension, one after the other, each from what those before it left in the store."""

    def __init__(self, extension: Extension, identity: ModelIdentity, console: Console, accept_numerics: bool) -> None:
        self.extension, self.identity, self.console = extension, identity, console
        self.say = partial(console.print, highlight=False)
        self.accept_numerics = accept_numerics
        self.plan, self.spec = extension.plan, identity.spec
        base = resolve_folder(extension.model.path, extension.model.trust_remote_code)
        self.tokenizer = load_tokenizer(base, extension.model.trust_remote_code)
        self.folders: dict[str, Path] = {BASE: base}
        self.weights = {BASE: model_digest(base, extension.model.trust_remote_code)}
        if self.weights[BASE] != identity.weights_sha256:
            raise LongRopeError(
                f"The model at {extension.model.path} is not the one this extension began with; put that one back, or "
                "start a new one."
            )
        self.found: dict[str, Factors] = {}
        self.kept: list[str] = []
        self.results: dict[str, dict[str, Any]] = {}
        self.evaluation: dict[str, Any] | None = None

    def shipped_at(self, length: int) -> Factors | None:
        """What the model's own config scales by at a length."""
        return shipped_factors(str(self.folders[BASE]), self.spec, length, self.extension.model.trust_remote_code)

    def stage(self, record: StageRecord) -> Stage:
        return self.plan.stages[record.stage]

    def take(self, record: StageRecord) -> None:
        """Take over what a finished stage left."""
        stage, result = self.stage(record), record.result
        assert result is not None
        self.results[stage.name] = result
        if stage.kind == FINETUNE:
            folder = self.extension.out / result["model"]
            digest = model_digest(folder, self.extension.model.trust_remote_code)
            if digest != result["weights_sha256"]:
                raise LongRopeError(
                    f"The model that stage {stage.name} left in {folder} has changed; put it back, or start anew."
                )
            self.folders[stage.name], self.weights[stage.name] = folder, digest
            if not stage.outside:  # the result is recorded: nothing else of the stage is needed any more
                for name in ("checkpoint-*", UNFINISHED, "ray"):
                    for leftover in self.extension.folder(stage.name).glob(name):
                        shutil.rmtree(leftover)
        elif stage.kind == EVALUATE:
            self.evaluation = result
        else:
            self.found[stage.name] = factors_of(result, result["served"])
            if stage.kind == RECOVER and result["served"] != TUNED:
                self.kept.append(stage.name)

    def run(self, store: StudyStore, record: StageRecord, checkpoint: Path | None) -> str | None:
        """One stage to its end; or what it waits for."""
        stage = self.stage(record)
        if stage.kind == FINETUNE:
            return self.finetune(store, record, checkpoint)
        if stage.kind == EVALUATE:
            self.evaluate(store, record)
        else:
            self.search(store, record)
        return None

    def request(self, stage: Stage, record: StageRecord, model: str) -> ModelRequest:
        """A stage's model at its length; a stage that goes on asks for the chunk it began with."""
        chunk = (record.profile or {}).get("chunk", self.extension.model.chunk)
        folder = self.extension.model.path if model == BASE else str(self.folders[model])
        return replace(self.extension.model, path=folder, target_length=stage.length, chunk=chunk)

    def begin(
        self,
        store: StudyStore,
        record: StageRecord,
        profile: Mapping[str, Any] | None,
        texts: Mapping[str, Iterable[str]],
    ) -> None:
        """Mark a stage running, on the documents, and under the numerics unless told, that it began with.

        Parameters
        ----------
        texts: by part, SHA-256 of each document.
        """
        digests = {part: hashlib.sha256("".join(each).encode()).hexdigest() for part, each in texts.items()}
        keep = record.profile is not None and self.accept_numerics
        settings: dict[str, Any] = {"name": self.stage(record).name, "documents": digests}
        store.begin_stage(record.stage, settings, None if keep else profile)

    def title(self, record: StageRecord) -> str:
        """What a stage is, for who watches."""
        stage, count = self.stage(record), len(self.plan.stages)
        return f"{self.extension.name}: stage {record.stage + 1} of {count}, {stage.name}, {stage.length:,} tokens"

    def search(self, store: StudyStore, record: StageRecord) -> None:
        """A search or a recovery."""
        stage = self.stage(record)
        sets = stage_windows(self.extension.corpus, stage, self.tokenizer, self.spec.original_length)
        tokens = {w.document.sha256: w.tokens for windows in sets.windows.values() for w in windows}
        documents = {part: [w.document for w in windows] for part, windows in sets.windows.items()}
        with open_scorer(self.request(stage, record, stage.model), tokens, self.extension.pool, self.say) as scorer:
            self.begin(
                store, record, scorer.info.profile, {part: [d.sha256 for d in documents[part]] for part in documents}
            )
            plan = stage_plan(self.plan, record.stage, scorer.info.spec, scorer.info.shipped, self.found)
            result = search(plan, documents, scorer, store, self.console, self.title(record))
        served = "searched"
        if stage.kind == RECOVER:  # the short regime is kept only where it wins on the selection documents
            served = recovered({name: score.loss for name, score in scores(result, "selection").items()})
        store.finish_stage(record.stage, {**result, "served": served})

    def finetune(self, store: StudyStore, record: StageRecord, checkpoint: Path | None) -> str | None:
        """A fine-tuning at fixed factors, here or by another trainer."""
        stage, number = self.stage(record), record.stage
        factors = tuning_factors(stage, self.spec, self.found)
        if stage.outside:
            self.begin(store, record, None, {})
            return self.from_outside(store, number, factors, checkpoint)
        tuning, work = stage.tuning, self.extension.folder(stage.name)
        held_out = stage_windows(
            self.extension.corpus, replace(stage, length=tuning.length), self.tokenizer, self.spec.original_length
        )
        windows = held_out.windows["selection"]
        documents = training_documents(self.extension.train, self.extension.corpus.text_column, self.tokenizer)
        read = {"train": [d.sha256 for d in documents], "held out": [w.document.sha256 for w in windows]}
        pool = self.extension.pool
        spread = on_cluster(pool)
        self.begin(store, record, self.training_profile(spread), read)
        texts = [document.tokens for document in documents]
        chunks, short = training_chunks(tuning, texts, self.tokenizer, self.spec.original_length)
        recorded = store.checkpoints(number)
        resume = None
        if recorded:
            last = recorded[-1]
            resume = Checkpoint(last.step, self.extension.out / last.path, last.sha256)
            self.console.print(f"going on from the checkpoint of step {last.step}", highlight=False)

        watcher = TuningWatcher(self.console, tuning.steps, self.title(record))

        def on_log(step: int, values: Mapping[str, float]) -> None:
            store.log_training(number, step, values)
            watcher.logged(step, values)

        def on_checkpoint(written: Checkpoint) -> None:
            store.record_checkpoint(number, written.step, self.inside(written.path), written.sha256)
            for older in store.checkpoints(number):
                if older.step < written.step:
                    store.forget_checkpoint(number, older.step)

        request = TuneRequest(
            str(self.folders[stage.model]),
            tuning,
            factors,
            work,
            threads=self.extension.threads,
            device=self.extension.model.device,
            sliding_window=self.extension.model.sliding_window,
            original_length=self.extension.model.original_length,
            trust_remote_code=self.extension.model.trust_remote_code,
        )
        arguments = (request, chunks, short, [w.tokens for w in windows], on_log, on_checkpoint)
        with watcher:
            if pool is not None and spread:
                folder = tune_on_cluster(*arguments, pool, resume)
            else:
                folder = tune(*arguments, resume)
                free_memory()
        self.tuned(store, number, folder)
        return None

    def training_profile(self, spread: bool) -> Mapping[str, Any]:
        """What decides the last bits of a fine-tuning beside its settings; a cluster's GPUs are not known here."""
        if spread and self.extension.pool is not None:
            device, threads = "cluster", self.extension.pool.workers
        else:
            device, threads = device_name(settle_device(self.extension.model.device)), self.extension.threads
        software = {name: version(name) for name in ("torch", "transformers", "accelerate")}
        return {"device": device, "threads": threads, **software}

    def from_outside(self, store: StudyStore, number: int, factors: Factors, checkpoint: Path | None) -> str | None:
        """Write what another trainer needs and wait; or take what it made."""
        stage = self.plan.stages[number]
        work, base = self.extension.folder(stage.name), self.folders[stage.model]
        if checkpoint is not None:
            check_tuned(checkpoint, base, self.extension.model.trust_remote_code)
            self.tuned(store, number, checkpoint.absolute())
            return None
        work.mkdir(parents=True, exist_ok=True)
        regime = Regime(1, stage.length, factors, attention_policy(stage, factors, self.spec))
        identity = replace(self.identity, weights_sha256=self.weights[stage.model])
        file = FactorFile(identity, (regime,), self.provenance())
        write(work / "factors.json", file)
        asked = json.dumps(stage.tuning.to_json(), indent=2)
        (work / "tuning.json").write_text(f"{asked}\n", encoding="utf-8")
        notes = ["factors.json", "tuning.json (all its settings)"]
        try:
            taken = take(file, form_room("transformers", identity.family))
            config = read_config_json(base)
            patch = config_patch("transformers", taken, config, window_in_force(file, config))
            (work / "config-patch.json").write_text(json.dumps(patch, indent=2) + "\n", encoding="utf-8")
            notes.append("config-patch.json (for transformers' own RoPE; put the base model's config back after it)")
        except LongRopeError as error:
            notes.append(f"no config patch: {error.what if isinstance(error, LossError) else error}")
        store.wait_outside(number)
        return (
            f"Stage {stage.name} waits for another trainer. Fine-tune {base} for {stage.tuning.steps} steps on chunks "
            f"of {stage.tuning.length} tokens, batch {stage.tuning.batch}{_beyond_defaults(stage)}, under the factors "
            f"in {work} ({'; '.join(notes)}), save the whole model, then: longrope resume {self.extension.name} "
            "--checkpoint FOLDER"
        )

    def tuned(self, store: StudyStore, number: int, folder: Path) -> None:
        """Record a tuned model."""
        result = {
            "model": self.inside(folder),
            "weights_sha256": model_digest(folder, self.extension.model.trust_remote_code),
        }
        store.finish_stage(number, result)

    def inside(self, path: Path) -> str:
        """A path as the store keeps it: from --out on, where it lies there, so that all of it can be moved."""
        out = self.extension.out.absolute()
        return str(path.absolute().relative_to(out) if path.absolute().is_relative_to(out) else path.absolute())

    def evaluate(self, store: StudyStore, record: StageRecord) -> None:
        """Every row at every length: perplexity on the test documents, passkey and key-value retrieval.

        A model at one length is a generation of each part, and the rows are its candidates: what was scored is kept,
        and is not computed again where rows or extensions share it.
        """
        stage, number = self.stage(record), record.stage
        asked = stage.evaluation
        table = rows(self.plan, asked, self.spec, self.found, self.kept, self.shipped_at)
        windows = {length: self.windows(stage, length) for length in asked.lengths}
        trials = {length: self.trials(asked, length) for length in asked.lengths}
        tokens = {w.document.sha256: w.tokens for found in windows.values() for w in found}
        tokens |= {trial.sha256: trial.tokens for found in trials.values() for trial in found}
        cells: dict[str, dict[str, Any]] = {row.name: {} for row in table}
        models = list(dict.fromkeys(row.model for row in table))

        def label(part: str, generation: int) -> str:
            place, column = divmod(generation, len(asked.lengths))
            return f"{models[place]}, {asked.lengths[column]:,}: {part.replace('_', '-')}"

        count = sum(
            len(windows[length]) + len(trials[length])
            for row in table
            for length, factors in row.factors.items()
            if factors is not None
        )
        watcher = Watcher(self.console, count, 0, title=self.title(record), label=label)
        for place, model in enumerate(models):
            pool = self.extension.pool
            with open_scorer(self.request(stage, record, model), tokens, pool, self.say) as scorer, watcher:
                self.begin(store, record, scorer.info.profile, {"test": sorted(tokens)})
                record = store.stage(number)
                for column, length in enumerate(asked.lengths):
                    here = {row.name: row.factors[length] for row in table if row.model == model}
                    served = [(name, Candidate(f, name)) for name, f in here.items() if f is not None]
                    if not served:
                        continue
                    parts = {"test": [w.document for w in windows[length]]}
                    for trial in trials[length]:
                        parts.setdefault(trial.task.kind, []).append(trial.document)
                    generation = place * len(asked.lengths) + column
                    for part, documents in parts.items():
                        candidates = [candidate for _, candidate in served]
                        found = score_generation(
                            part, generation, candidates, documents, scorer, store, watcher, number
                        )
                        for (name, _), score in zip(served, found, strict=True):
                            cell = cells[name].setdefault(str(length), {})
                            cell[part] = _measured(part, score, [t for t in trials[length] if t.task.kind == part])
                    self.console.print(f"{model}: {length} tokens done", highlight=False)
            del scorer  # before the next model is loaded
        store.finish_stage(number, {"lengths": list(asked.lengths), "rows": cells})

    def windows(self, stage: Stage, length: int) -> tuple[Window, ...]:
        """The test windows of one length."""
        here = replace(stage, length=length, windows={**stage.windows, "test": stage.evaluation.windows})
        return stage_windows(self.extension.corpus, here, self.tokenizer, self.spec.original_length).windows["test"]

    def trials(self, asked: Evaluation, length: int) -> list[Trial]:
        """The retrieval trials of one length; none of a task whose prompt does not fit."""
        depths = tuple(i / max(1, asked.passkey_depths - 1) for i in range(asked.passkey_depths))
        window = self.spec.original_length
        planned = [
            tasks(PASSKEY, length, window, depths=depths, trials=asked.passkey_trials),
            tasks(KEY_VALUE, length, window, trials=asked.key_value_trials),
        ]
        found: list[Trial] = []
        for group in planned:  # none of a task whose prompt does not fit; other refusals come before the study begins
            with suppress(TooShort):
                found += [make_trial(task, self.tokenizer) for task in group]
        return found

    def factor_file(self) -> FactorFile:
        """The table of regimes of the extended model: no time, host or path."""
        model = self.plan.final_model()
        shortest = 1 if model != BASE else self.spec.original_length + 1
        table = []
        for place in regimes(self.plan, self.spec, self.found, self.kept, self.shipped_at):
            table.append(self.regime(place, shortest, model))
            shortest = place.longest + 1
        name = self.identity.name if model == BASE else f"{self.identity.name}-{model}"
        identity = replace(self.identity, name=name, weights_sha256=self.weights[model])
        return FactorFile(identity, tuple(table), self.provenance())

    def regime(self, place: Place, shortest: int, model: str) -> Regime:
        """One regime; scores are there where the stage that found it worked on the model that is served."""
        policy = repr(place.factors.attention_factor)
        found: Mapping[str, RegimeScore] = {}
        without: WithoutNHat | None = None
        if place.source in self.results:
            stage, result = self.plan.stage(place.source), self.results[place.source]
            policy = attention_policy(stage, place.factors, self.spec)
            scored = stage.model == model and stage.length == place.longest
            found = regime_scores(result, result["served"]) if scored else {}
            if place.factors.n_hat and WITHOUT_N_HAT in result["factors"] and result["served"] == "searched":
                alternative = factors_of(result, WITHOUT_N_HAT)
                without = WithoutNHat(alternative, regime_scores(result, WITHOUT_N_HAT) if scored else {})
        return Regime(shortest, place.longest, place.factors, policy, found, without)

    def provenance(self) -> dict[str, object]:
        """Where the factors come from: no time, host or path."""
        searched = [stage for stage in self.plan.stages if stage.name in self.results and stage.kind in SEARCHES]
        data: dict[str, object] = {}
        computed_by: dict[str, object] = {"software": {"longrope-search": version("longrope-search")}}
        for stage in searched:
            result = self.results[stage.name]
            computed_by = dict(result["computed_by"])
            data[stage.name] = {part: list(size) for part, size in result["windows"].items()}
        return {
            "study": self.extension.name,
            "seed": next((stage.search.seed for stage in searched), None),
            "plan": self.plan.to_json(),
            "data": data,
            **computed_by,
        }


def _beyond_defaults(stage: Stage) -> str:
    """The settings of a tuning that are not the defaults, beside those that are always named."""
    tuning = stage.tuning
    usual = Tuning(tuning.length, tuning.steps, warmup=0, batch=tuning.batch).to_json() | {"warmup": Tuning.warmup}
    own = {key: value for key, value in tuning.to_json().items() if value != usual[key]}
    return "".join(f", {key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in own.items())


def _measured(part: str, score: Score, trials: Sequence[Trial]) -> dict[str, Any]:
    """One cell of the evaluation's table as plain values."""
    if score.failure is not None and part != "test":
        return {"failure": score.failure, "by_depth": [], "k_max": 0}
    if part == "test":
        return {"nll": score.nll if math.isfinite(score.nll) else None, "tokens": score.tokens}
    answers = [
        Answer(trial.task, wrong == 0, trial.distance, trial.chance)
        for trial, wrong in zip(trials, score.by_document, strict=True)
    ]
    return {"by_depth": [asdict(row) for row in accuracy_table(answers)], "k_max": effective_context(answers)}
