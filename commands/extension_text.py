"""The text of an extension: what each stage asks of the documents, and gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from searcher.errors import LongRopeError
from searcher.extension import EVALUATE, FINETUNE, RECOVER, SEARCH, ExtensionPlan, Stage
from searcher.study import PARTS
from searcher.tuning import Tuning
from workers.corpus import CorpusRequest, deal, study_windows
from workers.dataset import Ask, DocumentSets, TooFewDocuments
from workers.packing import Chunks, TokenArray, pack, short_documents

SEARCHES = (SEARCH, RECOVER)


def needed_parts(stage: Stage) -> tuple[str, ...]:
    """The sets that a stage uses: a fine-tuning's held-out text is the selection set."""
    return {FINETUNE: ("selection",), EVALUATE: ("test",)}.get(stage.kind, PARTS)


def stage_windows(corpus: CorpusRequest, stage: Stage, tokenizer: Any, original_length: int) -> DocumentSets:
    """The windows that a stage uses, of its own length.

    Raises
    ------
    LongRopeError
        As ``study_windows``; the message names the stage where too few documents are long enough.
    """
    here = replace(
        corpus, documents={**corpus.documents, **stage.documents}, windows={**corpus.windows, **stage.windows}
    )
    sampler = stage.search.sampler if stage.kind in SEARCHES else None
    two = sampler is not None and sampler.two_objectives
    short = min(original_length, stage.length)
    try:
        return study_windows(here, tokenizer, stage.length, short, short_search=two, parts=needed_parts(stage))
    except TooFewDocuments as error:
        raise _too_few(f"{stage.name}: {error.what}", corpus) from error


def deal_for_plan(corpus: CorpusRequest, plan: ExtensionPlan, tokenizer: Any) -> CorpusRequest:
    """The documents dealt once for all stages.

    Raises
    ------
    LongRopeError
        Too few are long enough for a stage, which the message names.
    """
    largest = {
        part: max(counts)
        for part in PARTS
        if (counts := [stage.documents[part] for stage in plan.stages if part in stage.documents])
    }
    if any(stage.kind == EVALUATE and "test" not in stage.documents for stage in plan.stages):
        largest.pop("test", None)  # it reports on all there are, though a search's own report may make do with few
    most = {**corpus.documents, **largest}
    longest = max(stage.length for stage in plan.stages)
    try:
        dealt = deal(replace(corpus, documents=most), tokenizer, longest, _asks(plan, corpus, most))
    except TooFewDocuments as error:
        raise _too_few(error.what, corpus) from error
    return replace(corpus, dealt=dealt.dealt)


def _asks(plan: ExtensionPlan, corpus: CorpusRequest, most: dict[str, int]) -> list[Ask]:
    """What each stage asks of documents that are dealt.

    A search needs all that it asks for. A fine-tuning without a count of its own and the evaluation make do with one
    document, and have the largest count of any stage where text is left over.
    """
    asks = []
    for stage in plan.stages:
        searches, length = stage.kind in SEARCHES, stage.length
        documents = {**(corpus.documents if searches else most), **stage.documents}
        windows = {**corpus.windows, **stage.windows}
        if stage.kind == EVALUATE:
            windows["test"] = stage.evaluation.windows
        elif stage.kind == FINETUNE:
            if stage.outside:
                continue
            length = stage.tuning.length
        quotas = replace(corpus, documents=documents, windows=windows).quotas()
        wanted = {part: quotas[part] for part in needed_parts(stage)}
        needed = {
            part: (quota.documents or 1) if searches else stage.documents.get(part, 1) for part, quota in wanted.items()
        }
        asks.append(Ask(stage.name, length, wanted, needed))
    return asks


def _too_few(what: str, corpus: CorpusRequest) -> LongRopeError:
    sources = "--data, --selection-data or --test-data" if corpus.selection else "--data"
    return LongRopeError(
        f"In the plan, stage {what}; lower its length or its documents, or name more or longer text with {sources}."
    )


def training_chunks(
    tuning: Tuning, texts: Sequence[TokenArray], tokenizer: Any, original_length: int
) -> tuple[Chunks, Chunks | None]:
    """What a fine-tuning reads: chunks, and with ``mixed_window`` short ones of the original length.

    Raises
    ------
    LongRopeError
        The text does not fill one chunk, or none of it is short where short documents are asked for.
    """
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    chunks = pack(texts, tuning.length, *ends, tuning.seed)
    if not tuning.mixed_window:
        return chunks, None
    whole = tuning.short_text == "documents"
    short = short_documents(texts, original_length, *ends) if whole else texts
    return chunks, pack(short, original_length, *ends, tuning.seed)
