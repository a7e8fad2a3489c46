"""Planted needles: exact length, other text untouched, spans that are the answers; and a trained model reads them."""

from __future__ import annotations

import hashlib
import math
import re
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from searcher.errors import LongRopeError
from searcher.study import Document
from tests.tiny_models import BOS, byte_tokenizer
from workers.corpus import CorpusRequest, load_corpus
from workers.dataset import Window
from workers.model import ModelRequest, load_model, load_tokenizer
from workers.needles import COMPACT_BELOW, plant
from workers.perplexity import token_losses
from workers.reference import MODEL_DIR

COMPACT_QUESTION = r"\nWhat is '([0-9a-f]{4})'\? '\1' = '(\d{4})'"
LITERAL_QUESTION = r"\nWhat is the pass key of ([0-9a-f]{4})\? The pass key of \1 is (\d{5})\."
COMPACT_NEEDLE = "\n'{}' = '{}'\n"
LITERAL_NEEDLE = "\nThe pass key of {0} is {1}. Remember it. {1} is the pass key of {0}.\n"


@cache
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece's way: a mark before every word, no BOS, and runs of digits that become one token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    sentence = "Remember it. The pass key of {0:04x}? '{0:04x}' = '{1}' What is {0}.\n"
    text = [sentence.format(i, i % 10000) for i in range(0, 65536, 7)]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@cache
def reference_tokenizer() -> Any:
    return load_tokenizer(MODEL_DIR)


TOKENIZERS = {"bytes": byte_tokenizer, "reference": reference_tokenizer, "merging": merging_tokenizer}
tokenizers = pytest.mark.parametrize("name", TOKENIZERS)


def plain_window(tokenizer: Any, length: int, seed: int = 0) -> Window:
    """Tokens of no digits, so that nothing in it looks like a needle; BOS first where there is one."""
    alphabet = [token for token, i in tokenizer.get_vocab().items() if i > 1 and not re.search(r"[\d']", token)]
    ids = np.asarray(sorted(tokenizer.convert_tokens_to_ids(alphabet)))
    tokens = np.random.default_rng(seed).choice(ids, length).astype(np.uint32)
    if tokenizer.bos_token_id is not None:
        tokens[0] = tokenizer.bos_token_id
    tokens.setflags(write=False)
    return Window(Document("text", hashlib.sha256(tokens.astype("<u4").data).hexdigest(), length), tokens, "source")


def pairs_asked(tokenizer: Any, window: Window) -> list[tuple[str, str]]:
    """Keys and values of the questions, read from the text."""
    question = COMPACT_QUESTION if len(window.tokens) < COMPACT_BELOW else LITERAL_QUESTION
    return re.findall(question, decoded(tokenizer, window.tokens))


def decoded(tokenizer: Any, tokens: Any) -> str:
    """The text, without the marks that some tokenizers put where an encoded piece begins."""
    return str(tokenizer.decode(tokens)).replace(" \n", "\n")


@tokenizers
@given(length=st.sampled_from([256, 300, 511, 2048, COMPACT_BELOW, 9001]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_a_planted_window_is_as_long_and_its_answers_are_the_needles_values(name: str, length: int, seed: int) -> None:
    tokenizer = TOKENIZERS[name]()
    window = plain_window(tokenizer, length, seed)
    planted = plant(window, tokenizer, seed, None if length > 400 else 1)
    document = planted.document
    assert (len(planted.tokens), planted.tokens.dtype, document.length) == (length, np.uint32, length)
    assert document.sha256 == hashlib.sha256(planted.tokens.astype("<u4").data).hexdigest()
    assert not planted.tokens.flags.writeable
    assert planted.source == window.source
    assert document.name == f"text+{len(document.spans)}needles"
    if tokenizer.bos_token_id is not None:
        assert planted.tokens[0] == tokenizer.bos_token_id
    asked = pairs_asked(tokenizer, planted)
    assert len(asked) == len(document.spans) >= 1
    assert len({key for key, _ in asked}) == len(asked)
    text = decoded(tokenizer, planted.tokens)
    needle = COMPACT_NEEDLE if length < COMPACT_BELOW else LITERAL_NEEDLE
    for (key, value), (start, end) in zip(asked, document.spans, strict=True):
        assert tokenizer.decode(planted.tokens[start:end]).strip(" '.") == value
        assert text.count(needle.format(key, value)) == 1, value
    assert list(document.spans) == sorted(document.spans)
    assert all(0 < start < end <= length for start, end in document.spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(document.spans))


@tokenizers
@pytest.mark.parametrize("count", [1, 3, 8])
def test_needles_are_spread_and_all_other_text_stays_where_it_was(name: str, count: int) -> None:
    tokenizer = TOKENIZERS[name]()
    window = plain_window(tokenizer, 2048)
    planted = plant(window, tokenizer, 1, count)
    changed = np.flatnonzero(planted.tokens != window.tokens)
    asked = pairs_asked(tokenizer, planted)
    needles = [
        tokenizer(COMPACT_NEEDLE.format(key, value), add_special_tokens=False)["input_ids"] for key, value in asked
    ]
    questions_from = planted.document.spans[0][0] - max(map(len, needles)) - 40
    assert set(changed[changed < questions_from]) <= {
        place for needle in needles for place in range(_place(planted, needle), _place(planted, needle) + len(needle))
    }
    # One in every share of the text before the questions.
    places = sorted(_place(planted, needle) for needle in needles)
    shares = [place * count // planted.document.spans[0][0] for place in places]
    assert all(abs(share - i) <= 1 for i, share in enumerate(shares))


def _place(window: Window, needle: list[int]) -> int:
    rows = np.lib.stride_tricks.sliding_window_view(window.tokens, len(needle))
    (place,) = np.flatnonzero((rows == needle).all(axis=1))
    return int(place)


def test_needles_stand_at_every_depth() -> None:
    tokenizer = byte_tokenizer()
    depths = []
    for seed in range(60):
        planted = plant(plain_window(tokenizer, 2048), tokenizer, seed, 1)
        ((key, value),) = pairs_asked(tokenizer, planted)
        depths.append(_place(planted, tokenizer(COMPACT_NEEDLE.format(key, value))["input_ids"]) / 2048)
    assert min(depths) < 0.1
    assert max(depths) > 0.85
    assert np.mean(depths) == pytest.approx(0.5, abs=4 * 0.29 / 60**0.5)


def test_the_same_seed_and_text_give_the_same_needles_and_others_give_others() -> None:
    tokenizer = byte_tokenizer()
    window = plain_window(tokenizer, 1024)
    planted = plant(window, tokenizer, 0)
    assert plant(window, tokenizer, 0).document == planted.document
    others = [plant(window, tokenizer, 1), plant(plain_window(tokenizer, 1024, 1), tokenizer, 0)]
    keys = [{key for key, _ in pairs_asked(tokenizer, each)} for each in (planted, *others)]
    assert len(set.union(*keys)) == sum(map(len, keys))


def test_the_needles_of_a_seed_are_the_same_for_ever() -> None:
    """A study that goes on must find the documents it began with."""
    planted = plant(plain_window(byte_tokenizer(), 512), byte_tokenizer(), 7, 2)
    assert pairs_asked(byte_tokenizer(), planted) == [("4606", "6704"), ("82e5", "5635")]


@pytest.mark.parametrize(("length", "count"), [(256, 2), (1024, 8), (2048, 16), (COMPACT_BELOW, 16)])
def test_longer_windows_hold_more_needles_up_to_a_number(length: int, count: int) -> None:
    planted = plant(plain_window(reference_tokenizer(), length), reference_tokenizer(), 0)
    assert len(planted.document.spans) == count


def test_questions_come_in_an_order_of_their_own() -> None:
    tokenizer = byte_tokenizer()
    planted = plant(plain_window(tokenizer, 4096), tokenizer, 0, 16)
    asked = pairs_asked(tokenizer, planted)
    places = [_place(planted, tokenizer(COMPACT_NEEDLE.format(*pair))["input_ids"]) for pair in asked]
    assert places != sorted(places)
    assert places != sorted(places, reverse=True)


@pytest.mark.parametrize(
    ("length", "count", "message"),
    [
        (64, 2, "A window of 64 tokens has no room for needles and questions, 2 of each"),
        (40, None, "A window of 40 tokens has no room for needles and questions, 1 of each"),
        (2048, 60, "questions, 60 of each"),
        (2048, 0, "At least 1 needle"),
    ],
)
def test_what_does_not_fit_is_refused(length: int, count: int | None, message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        plant(plain_window(byte_tokenizer(), length), byte_tokenizer(), 0, count)


def test_a_tokenizer_without_digits_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "What": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token=BOS)
    tokens = np.full(512, 2, np.uint32)
    with pytest.raises(LongRopeError, match="tells digits apart"):
        plant(Window(Document("text", "0", 512), tokens, "source"), tokenizer, 0, 1)


@torch.inference_mode()
def test_the_reference_model_reads_its_needles_and_cannot_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Inside its window; chance is ln 10 = 2.30 nats a digit, and all there is once the needles are taken out."""
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path_factory.getbasetemp() / "reference-cache"))
    tokenizer = reference_tokenizer()
    model = load_model(ModelRequest(str(MODEL_DIR), 512))
    windows = load_corpus(CorpusRequest(), tokenizer, 256).windows["search"]
    read, blind = [], []
    for window in windows:
        planted = plant(window, tokenizer, 0, 2)
        scored = np.concatenate([np.arange(start, end) for start, end in planted.document.spans])
        assert len(scored) == 8
        read.append(token_losses(model, planted.tokens, None).numpy()[scored - 1])
        without = np.array(planted.tokens)
        questions_from = planted.document.spans[0][0] - 24
        without[:questions_from] = window.tokens[:questions_from]
        blind.append(token_losses(model, without, None).numpy()[scored - 1])
    assert np.mean(read) < 0.25 * math.log(10)
    assert np.mean(blind) > math.log(10)
