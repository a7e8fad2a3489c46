"""A progressive extension from its plan to its table of regimes: search, fine-tune, search on, recover, evaluate."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from commands.extension_stages import Driver
from commands.extension_text import deal_for_plan, stage_windows, training_chunks
from commands.options import stem
from commands.runs import identity_of
from searcher.errors import LongRopeError
from searcher.extension import (
    BASE,
    EVALUATE,
    FINETUNE,
    ExtensionPlan,
    Stage,
    check_lengths,
)
from searcher.regimes import StageCost, costs
from searcher.second import check_searches
from storage.factor_file import ModelIdentity, to_json, write
from storage.report import plan_table
from storage.repository import Repository
from storage.stages import FINISHED
from workers.corpus import CorpusRequest, absolute, training_documents
from workers.dataset import Window
from workers.finetune import peft_package
from workers.model import ModelRequest, load_model, load_tokenizer, resolve_folder
from workers.scorer import PoolRequest, describe
from workers.train_cluster import check_devices


@dataclass(frozen=True)
class Extension:
    """What an extension is made of, and how it is computed. All but ``pool`` is fixed at launch and kept by the store.

    Attributes
    ----------
    model: the model to extend; every stage takes it, or a tuned one, at its own length.
    train: text to fine-tune on; empty for what the reference model was trained on.
    threads: CPU threads of a fine-tuning, part of what decides its last bits.
    pool: Ray workers; None computes in this process.
    out: folder of the factor file, and of a folder of the study's name with checkpoints and models.
    """

    name: str
    plan: ExtensionPlan
    model: ModelRequest
    corpus: CorpusRequest
    train: tuple[str, ...]
    threads: int
    pool: PoolRequest | None
    out: Path

    def to_json(self) -> dict[str, Any]:
        """What the store keeps; ``from_json`` gives an equal object back."""
        return {
            "plan": self.plan.to_json(),
            "model": asdict(self.model),
            "corpus": self.corpus.to_json(),
            "train": [absolute(source) for source in self.train],
            "threads": self.threads,
            "pool": None if self.pool is None else asdict(self.pool),
            "out": str(self.out.absolute()),
        }

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Extension:
        """The inverse of ``to_json``."""
        return cls(
            name,
            ExtensionPlan.from_json(data["plan"]),
            ModelRequest(**data["model"]),
            CorpusRequest.from_json(data["corpus"]),
            tuple(data["train"]),
            data["threads"],
            None if data["pool"] is None else PoolRequest(**data["pool"]),
            Path(data["out"]),
        )

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints and its model."""
        return self.out / stem(self.name) / stage


@dataclass(frozen=True)
class Extended:
    """What came of a run.

    Attributes
    ----------
    factors: the factor file; None where the extension waits.
    model: folder or name of the model that the file is for, its weights included; None where the extension waits.
    result: of the evaluation; None where the plan has none, or the extension waits.
    waits_for: what it waits for; None where it is finished.
    """

    factors: Path | None
    result: dict[str, Any] | None
    seconds: float
    waits_for: str | None = None
    model: str | None = None


def extend(
    repository: Repository,
    extension: Extension,
    console: Console,
    is_new: bool,
    checkpoint: Path | None = None,
    accept_numerics: bool = False,
) -> Extended:
    """Run, or go on with, an extension to its end, or to where it waits for an outside trainer.

    Parameters
    ----------
    checkpoint: what an outside trainer made, for the stage that waits for it.

    Raises
    ------
    LongRopeError
        Something is missing, or an extension that goes on finds another model, other documents or other numerics.
    """
    started = time.monotonic()
    if not extension.out.is_dir():
        raise LongRopeError(f"--out must be a folder that exists; {extension.out} is none.")
    if checkpoint is not None and not checkpoint.is_dir():
        raise LongRopeError(f"--checkpoint is the folder of a whole model; {checkpoint} is none.")
    extension = replace(extension, out=extension.out.resolve())  # workers elsewhere are told of paths in it
    if is_new:
        _create(repository, extension, console)
    stored = repository.study(extension.name).settings
    identity = ModelIdentity(**stored["identity"])
    extension = replace(  # as they were settled
        extension, corpus=CorpusRequest.from_json(stored["corpus"]), model=ModelRequest(**stored["model"])
    )
    driver = Driver(extension, identity, console, accept_numerics)
    with repository.open_study(extension.name) as store:
        waiting = next((r for r in store.stages() if r.status != FINISHED), None)
        if checkpoint is not None and (waiting is None or not driver.stage(waiting).outside):
            raise LongRopeError(f"No stage of {extension.name} waits for a --checkpoint now; resume it without.")
        path = extension.out / f"{stem(extension.name)}-factors.json"
        for record in store.stages():
            if record.status != FINISHED:
                if driver.stage(record).kind == EVALUATE:  # which takes long, and changes nothing of it
                    write(path, driver.factor_file())
                console.rule(f"stage {record.stage + 1} of {len(driver.plan.stages)}: {driver.stage(record).name}")
                waits = driver.run(store, record, checkpoint)
                if waits is not None:
                    return Extended(None, None, time.monotonic() - started, waits)
                checkpoint = None if driver.stage(record).outside else checkpoint
            driver.take(store.stage(record.stage))
        file, model = driver.factor_file(), driver.plan.final_model()
        served = extension.model.path if model == BASE else driver.inside(driver.folders[model])
        # The file first: a study that is marked finished has left its file.
        write(path, file)
        result: dict[str, Any] = {"factors": to_json(file), "evaluation": driver.evaluation, "model": served}
        store.finish(result)
    shown = extension.model.path if model == BASE else str(driver.folders[model])
    return Extended(path, driver.evaluation, time.monotonic() - started, model=shown)


def _create(repository: Repository, extension: Extension, console: Console) -> None:
    """Write the study, once everything that its stages need from outside is there, to the last window and trial."""
    model = extension.model
    loaded = load_model(replace(model, device="cpu", stream_weights=False))
    info = describe(loaded, model)
    check_lengths(extension.plan, info.spec)
    check_searches(extension.plan, info.spec)
    # What a tuned model is saved as may differ from its base: one dtype for all stages, so that they compare.
    model = replace(model, dtype=str(info.profile["dtype"]))
    del loaded
    folder = resolve_folder(model.path, model.trust_remote_code)
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    extension = replace(extension, model=model, corpus=deal_for_plan(extension.corpus, extension.plan, tokenizer))
    identity = identity_of(model, info)
    driver = Driver(extension, identity, console, accept_numerics=False)
    tuned = [stage for stage in extension.plan.stages if stage.kind == FINETUNE and not stage.outside]
    held_out: set[str] = set()
    windows: list[Window] = []
    for stage in extension.plan.stages:
        if stage.kind == EVALUATE:
            windows = [w for length in stage.evaluation.lengths for w in driver.windows(stage, length)]
            for length in stage.evaluation.lengths:
                driver.trials(stage.evaluation, length)
        elif stage in tuned or stage.kind != FINETUNE:
            length = stage.tuning.length if stage.kind == FINETUNE else stage.length
            sets = stage_windows(extension.corpus, replace(stage, length=length), tokenizer, info.spec.original_length)
            windows = [w for found in sets.windows.values() for w in found]
        held_out |= {window.source for window in windows}
    if tuned:
        _check_tunings(extension, tuned, tokenizer, info.spec.original_length, held_out)
    console.print(plan_table(extension.plan, costs(extension.plan, info.spec)))
    planned = [(stage.kind, {"name": stage.name}) for stage in extension.plan.stages]
    repository.create_study(extension.name, "extension", {**extension.to_json(), "identity": asdict(identity)}, planned)


def _check_tunings(
    extension: Extension, stages: Sequence[Stage], tokenizer: Any, original_length: int, held_out: Collection[str]
) -> None:
    """Refuse what a fine-tuning here would find missing, and text, by its SHA-256, that is searched or tested on."""
    documents = training_documents(extension.train, extension.corpus.text_column, tokenizer)
    shared = [document.name for document in documents if document.sha256 in held_out]
    if shared:
        raise LongRopeError(
            f"{shared[0]} ({len(shared)} in all) is in the training text and among the documents that are searched or "
            "tested on; name text with --train-data that is in none of the other sets."
        )
    texts = [document.tokens for document in documents]
    for stage in stages:
        try:
            training_chunks(stage.tuning, texts, tokenizer, original_length)
            check_devices(stage.tuning, extension.pool)
            if stage.tuning.lora_rank is not None:
                peft_package()
        except LongRopeError as error:
            raise LongRopeError(f"In the plan, stage {stage.name}: {error}") from error


def plan_costs(plan: ExtensionPlan, request: ModelRequest) -> list[StageCost]:
    """What each stage of a plan costs for a model."""
    spec = load_model(replace(request, device="cpu", stream_weights=False)).spec
    check_lengths(plan, spec)
    check_searches(plan, spec)
    return list(costs(plan, spec))
