"""One study from its documents to its factor file: where workers and storage meet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from commands.options import stem
from searcher.errors import LongRopeError
from searcher.plan import SearchSettings, cut_seeds, search_plan
from searcher.search import SearchPlan, run_search
from searcher.space import GRID
from searcher.study import Document, Store
from storage.factor_file import FactorFile, ModelIdentity, write
from storage.live import Watcher
from storage.repository import Repository
from storage.results import Result, factor_file, result_json
from workers.corpus import CorpusRequest, study_windows
from workers.model import ModelInfo, ModelRequest, load_tokenizer, read_original_length, resolve_folder
from workers.scorer import PoolRequest, open_scorer

if TYPE_CHECKING:
    from workers.dataset import DocumentSets
    from workers.pool import RayScorer
    from workers.scorer import LocalScorer


@dataclass(frozen=True)
class Run:
    """What a study is made of, and how it is computed. All but ``pool`` is fixed at launch and kept by the store.

    Attributes
    ----------
    pool: Ray workers; None scores in this process.
    out: folder the factor file is written to.
    """

    name: str
    model: ModelRequest
    corpus: CorpusRequest
    search: SearchSettings
    pool: PoolRequest | None
    out: Path

    def to_json(self) -> dict[str, Any]:
        """What the store keeps; ``from_json`` gives an equal object back."""
        return {
            "model": asdict(self.model),
            "corpus": self.corpus.to_json(),
            "search": self.search.to_json(),
            "pool": None if self.pool is None else asdict(self.pool),
            "out": str(self.out.absolute()),
        }

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Run:
        """The inverse of ``to_json``."""
        return cls(
            name,
            ModelRequest(**data["model"]),
            CorpusRequest.from_json(data["corpus"]),
            SearchSettings.from_json(data["search"]),
            None if data["pool"] is None else PoolRequest(**data["pool"]),
            Path(data["out"]),
        )


@dataclass(frozen=True)
class Finished:
    """A study that came to its end: its result, the factor file, and the seconds this run took."""

    result: Result
    factors: Path
    seconds: float


def run(repository: Repository, run: Run, console: Console, is_new: bool, accept_numerics: bool = False) -> Finished:
    """Load, then search to the end. A new study exists from the moment that everything it needs is there.

    Raises
    ------
    LongRopeError
        Something is missing, or a study that goes on finds another model, other documents or other numerics.
    """
    started = time.monotonic()
    if not run.out.is_dir():
        raise LongRopeError(f"--out must be a folder that exists; {run.out} is none.")
    tokenizer = load_tokenizer(resolve_folder(run.model.path, run.model.trust_remote_code), run.model.trust_remote_code)
    trained = run.model.original_length or read_original_length(run.model.path, run.model.trust_remote_code)
    two = run.search.sampler is not None and run.search.sampler.two_objectives
    sets = study_windows(run.corpus, tokenizer, run.model.target_length, trained, short_search=two)
    tokens = {w.document.sha256: w.tokens for windows in sets.windows.values() for w in windows}
    documents = {part: [w.document for w in windows] for part, windows in sets.windows.items()}
    hashes = {part: [d.sha256 for d in found] for part, found in documents.items()}
    with open_scorer(run.model, tokens, run.pool, partial(console.print, highlight=False)) as scorer:
        plan = search_plan(run.search, scorer.info.spec, scorer.info.shipped)
        if is_new:
            identity = asdict(identity_of(run.model, scorer.info))
            # With the chunk that fitted here, so that a resume asks for the same.
            chunk = scorer.info.profile["chunk"]
            settled = replace(run, model=replace(run.model, chunk=chunk if isinstance(chunk, int) else None))
            repository.create_study(
                run.name,
                "search",
                {**settled.to_json(), "identity": identity, "documents": hashes, "probe": scorer.info.probe},
            )
        with repository.open_study(run.name) as store:
            record = repository.study(run.name)
            _refuse_changes(record.settings, record.profile, scorer.info, hashes, accept_numerics)
            if record.profile is None:
                store.set_profile(scorer.info.profile)
            _introduce(console, run, scorer.info, sets, plan)
            scale = run.model.target_length / scorer.info.spec.original_length
            title = f"{run.name}: {Path(run.model.path).name} to {run.model.target_length:,} tokens, {scale:g} times"
            result = search(plan, documents, scorer, store, console, title)
            path = run.out / f"{stem(run.name)}-factors.json"
            # The file first: a study that is marked finished has left its file.
            write(path, study_factor_file(run.name, record.settings, result))
            store.finish(result)
    return Finished(result, path, time.monotonic() - started)


def search(
    plan: SearchPlan,
    documents: Mapping[str, Sequence[Document]],
    scorer: LocalScorer | RayScorer,
    store: Store,
    console: Console,
    title: str,
) -> Result:
    """One search stage to its end, watched under a title; what it found as plain values."""
    counts = {part: len(windows) for part, windows in documents.items()}
    watcher = Watcher(
        console,
        plan.most_evaluations(counts["search"]),
        (plan.sampler or plan.evolution).generations,
        gradients=0 if plan.refinement is None else plan.refinement.gradients,
        afterwards=plan.evaluations_after(counts),
        title=title,
    )
    with watcher:
        found = run_search(plan, documents, scorer, store, watcher)
    console.print(watcher.summary(), highlight=False)
    sizes = {part: (len(windows), windows[0].length) for part, windows in documents.items()}
    return result_json(plan, found, sizes, computed_by(scorer.info))


def _refuse_changes(
    settings: Mapping[str, Any],
    profile: Mapping[str, Any] | None,
    info: ModelInfo,
    hashes: Mapping[str, list[str]],
    accept_numerics: bool,
) -> None:
    """A study goes on only with the model and the documents it began with, and with its numerics unless told."""
    if settings["identity"]["weights_sha256"] != info.weights_sha256:
        raise LongRopeError(
            f"The model at {settings['model']['path']} is not the one this study began with; put that one back, or "
            "launch a new study."
        )
    probe = settings.get("probe")
    if profile in (None, info.profile) and probe not in (None, info.probe) and not accept_numerics:
        raise LongRopeError(
            f"This machine gives a loss of {info.probe} for a text whose loss was {probe} where this study began, with "
            "the same model and software; resume where it began, look for a broken device, or give --accept-numerics."
        )
    changed = [part for part, found in settings["documents"].items() if hashes[part] != found]
    if changed:
        raise LongRopeError(
            f"The {changed[0]} documents are not those this study began with; put them back, or launch a new study."
        )
    if profile is not None and dict(profile) != info.profile and not accept_numerics:
        unlike = [
            f"{key} {profile.get(key)} -> {info.profile[key]}"
            for key in info.profile
            if profile.get(key) != info.profile[key]
        ]
        raise LongRopeError(
            f"This study began with other numerics ({'; '.join(unlike)}), so its scores would not be bit-identical; "
            "resume where it began, or give --accept-numerics."
        )


def identity_of(request: ModelRequest, info: ModelInfo) -> ModelIdentity:
    shipped = None
    if info.shipped is not None:
        shipped = {"rope_type": info.shipped[0], "attention_factor": info.shipped[1].attention_factor}
    spec = info.spec
    return ModelIdentity(
        name=Path(request.path).name,
        weights_sha256=info.weights_sha256,
        family=spec.family,
        theta=spec.theta,
        rotary_dim=spec.rotary_dim,
        original_length=spec.original_length,
        layers=spec.layers,
        pairing=info.pairing,
        shipped_scaling=shipped,
    )


def computed_by(info: ModelInfo) -> dict[str, object]:
    """What a factor file says of how its scores were computed: nothing that names the machine."""
    kernels = ("dtype", "attention", "sliding_window")
    return {
        "software": {
            "longrope-search": version("longrope-search"),
            **{key: str(info.profile[key]) for key in ("torch", "transformers", "scorer")},
        },
        "numerics": {key: info.profile[key] for key in kernels},
    }


def study_factor_file(name: str, settings: Mapping[str, Any], result: Result, method: str = "searched") -> FactorFile:
    """The factor file of a study, from what the store holds of it: no time, host or path."""
    search = SearchSettings.from_json(settings["search"])
    data = {
        part: {"windows": len(hashes), "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest()}
        for part, hashes in settings["documents"].items()
    }
    provenance = {
        "study": name,
        "seed": search.seed,
        "method": method,
        "search": settings["search"],
        "forwards": result["forwards"],
        "data": data,
        **result["computed_by"],
    }
    return factor_file(ModelIdentity(**settings["identity"]), search, result, provenance, method)


def _introduce(console: Console, run: Run, info: ModelInfo, sets: DocumentSets, plan: SearchPlan) -> None:
    spec, profile = info.spec, info.profile
    scale = run.model.target_length / spec.original_length
    lines = [
        f"study {run.name}: {Path(run.model.path).name} ({spec.family}, window {spec.original_length}), "
        f"target {run.model.target_length} tokens, scale {scale:g}",
        f"about {plan.most_evaluations(sets.summary()['search'].windows)} evaluations of {spec.pairs} rescale factors "
        f"and n_hat, {0 if plan.refinement is None else plan.refinement.gradients} of them gradient steps; "
        f"attention factor {plan.attention_factor:.4f}; "
        f"{profile['dtype']}, {profile['attention']}, {profile['device']}",
    ]
    if info.shipped is not None:
        lines.append(
            f"The model's own config scales RoPE ({info.shipped[0]}); factors are absolute, against base "
            f"{spec.theta:g} unscaled, and the shipped scaling is a seed and a row."
        )
    cut = cut_seeds(plan)
    if cut:
        lines.append(f"seeds cut to the upper bound of {plan.space.upper / GRID:g}: {', '.join(cut)}")
    for part, size in sets.summary().items():
        lines.append(f"{part}: {size.windows} windows of {size.documents} documents, {size.tokens} tokens scored")
    if sets.left_out:
        lines.append(f"{len(sets.left_out)} documents are too short and left out, {sets.left_out[0]} among them")
    for line in lines:
        console.print(line, highlight=False)
