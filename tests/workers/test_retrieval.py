"""Retrieval trials: exact lengths, published sentences, one forward that says what greedy decoding does."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.train_reference import key_value_example, passkey_example
from searcher.baselines import yarn
from searcher.errors import LongRopeError
from searcher.rope import Factors
from tests.tiny_models import BOS, byte_tokenizer
from tests.workers.test_needles import TOKENIZERS, reference_tokenizer, tokenizers
from workers.accuracy import Answer, accuracy_table, effective_context, wilson_interval
from workers.frames import COMPACT, JSON, KEY_VALUE, LITERAL, PASSKEY, TITLE
from workers.generation import TITLE_FRAMES, TitleTrial, greedy, score_title, title_trial
from workers.model import LoadedModel, ModelRequest, load_model
from workers.reference import MODEL_DIR
from workers.retrieval import PAPER_DEPTHS, PAPER_TRIALS, Task, Trial, make_trial, most, score_trial, tasks

SMALL, LARGE = 256, 4096  # windows that get the compact and the literal frame
kinds = pytest.mark.parametrize("kind", [PASSKEY, KEY_VALUE, JSON])
windows = pytest.mark.parametrize("window", [SMALL, LARGE])


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model(ModelRequest(str(MODEL_DIR), 512))


@pytest.fixture(scope="module")
def reference_in_pieces() -> LoadedModel:
    return load_model(ModelRequest(str(MODEL_DIR), 512, chunk=100))


def text_of(trial: Trial, tokenizer: Any) -> str:
    """Prompt and answer, BOS aside."""
    text = tokenizer.decode(trial.tokens[tokenizer.bos_token_id is not None :])
    assert isinstance(text, str)
    return text


@tokenizers
@windows
@given(length=st.integers(600, 2500), depth=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_a_passkey_prompt_with_bos_and_answer_is_exactly_as_long_as_stated(
    name: str, window: int, length: int, depth: float, seed: int
) -> None:
    tokenizer = TOKENIZERS[name]()
    (task,) = tasks(PASSKEY, length, window, seed, [depth], 1)
    trial = make_trial(task, tokenizer)
    assert (len(trial.tokens), trial.tokens.dtype, trial.answer[1]) == (length, np.uint32, length)
    assert not trial.tokens.flags.writeable
    if tokenizer.bos_token_id is not None:
        assert trial.tokens[0] == tokenizer.bos_token_id
    text = text_of(trial, tokenizer)
    # The passkey is said twice and answered once, and nowhere else is there a digit.
    assert re.findall(r"\d+", text) == [trial.expected] * 3
    assert tokenizer.decode(trial.tokens[slice(*trial.answer)]).strip(" .") == trial.expected
    if "<unk>" in text:
        return
    # They are the tokenizer's own tokens of that text, not tokens that no text becomes.
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = trial.tokens[tokenizer.bos_token_id is not None :].tolist()
    assert whole[: len(own) - 1] == own[:-1]
    before, behind = re.split(r"\nThe pass key is \d+\. Remember it\. \d+ is the pass key\.\n", text)
    filler = len(before) + len(behind)
    assert len(before) == pytest.approx(depth * filler, abs=0.02 * filler + 160)


# The third tokenizer does not know the sign that JSON quotes with.
@pytest.mark.parametrize(
    ("kind", "name"), [*((KEY_VALUE, name) for name in TOKENIZERS), (JSON, "bytes"), (JSON, "reference")]
)
@windows
@pytest.mark.parametrize("length", [600, 1031, 3000])
def test_as_many_pairs_as_fit_beside_the_room_and_the_one_asked_for_at_its_depth(
    name: str, window: int, kind: str, length: int
) -> None:
    tokenizer = TOKENIZERS[name]()
    room = 256 if window == LARGE else 32
    for task in tasks(kind, length + 256, window, trials=1):
        trial = make_trial(task, tokenizer)
        start, end = trial.answer
        assert (task.room, end) == (room, len(trial.tokens))
        longest_pair = 90 if kind == JSON and window == LARGE else 32
        assert task.length - room - longest_pair < end - (end - start) < task.length - room
        text = text_of(trial, tokenizer)
        listed = re.split(r"What is|Key:", text)[0]
        pairs = re.findall(r"""['"]([0-9a-f-]+)['"](?: =|:) ['"]([0-9a-f-]+)['"]""", listed)
        asked = [i for i, (_, value) in enumerate(pairs) if value == trial.expected]
        assert len(asked) == 1, "exactly one pair holds the answer"
        assert asked[0] == pytest.approx(task.depth * (len(pairs) - 1), abs=1)
        assert text.count(pairs[asked[0]][0]) == (2 if (kind, window) == (JSON, LARGE) else 3)
        assert trial.chance == 1 / len(pairs)
        assert tokenizer.decode(trial.tokens[start:end]).strip(" '\"") == trial.expected


def test_the_literal_frames_are_the_published_sentences() -> None:
    tokenizer = byte_tokenizer()
    texts = {kind: text_of(make_trial(tasks(kind, 2048, LARGE)[4], tokenizer), tokenizer) for kind in (PASSKEY, JSON)}
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    opening, before, needle, behind, question = texts[PASSKEY].split("\n")
    assert opening == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there."
    )
    assert re.fullmatch(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.", needle)
    assert re.fullmatch(r"What is the pass key\? The pass key is \d{5}", question)
    assert (filler * 30).startswith(before)
    assert (filler * 30).startswith(behind)
    hexadecimal = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(
        r"Extract the value corresponding to the specified key in the JSON object below\.\n\nJSON data:\n"
        r'\{"UUID": "UUID"(,\n "UUID": "UUID")*\}\n\nKey: "UUID"\nCorresponding value: "UUID'.replace(
            "UUID", hexadecimal
        ),
        texts[JSON],
    )
    data = json.loads(texts[JSON][texts[JSON].index("{") : texts[JSON].index("}") + 1])
    asked = texts[JSON].split('"')[-3]
    assert data[asked] == texts[JSON].split('"')[-1]
    lines = text_of(make_trial(tasks(KEY_VALUE, 2048, LARGE)[0], tokenizer), tokenizer)
    assert re.fullmatch(
        r"## UUID key/value pairs to remember:\n\n('[0-9a-f]{8}' = '[0-9a-f]{4}'\n)+"
        r"\n\n What is the value of the key '([0-9a-f]{8})'\?\n'\2' = '[0-9a-f]{4}",
        lines,
    )


def test_the_compact_frames_are_what_the_reference_model_was_trained_on() -> None:
    """The same sentences, but for the numbers and how much of the filler there is."""
    tokenizer = byte_tokenizer()

    def sentences(text: str) -> set[str]:
        without = re.sub(r"(?<=[ '\"])[0-9a-f]{4,5}(?=\W|$)", "N", text)
        return {line.removesuffix(".").removesuffix("'").removesuffix('"') for line in without.split("\n")}

    rng = random.Random(0)
    trained = set.union(*(sentences(passkey_example(rng, "")) | sentences(key_value_example(rng)) for _ in range(300)))
    for kind in (PASSKEY, KEY_VALUE, JSON):
        for task in tasks(kind, 2048, SMALL, depths=[0.5], trials=3):
            ours = sentences(text_of(make_trial(task, tokenizer), tokenizer))
            cut = {s for s in ours if any(t.startswith(s) for t in trained)}
            assert ours - cut == set()
            assert len(ours - trained) <= (2 if kind == PASSKEY else 0)  # lines of filler that were cut


def test_a_task_gives_the_same_trial_for_ever_and_another_gives_another() -> None:
    tokenizer = byte_tokenizer()
    task = Task(PASSKEY, COMPACT, 700, 0, 0.5, 3, 7)
    trial = make_trial(task, tokenizer)
    assert (trial.expected, trial.sha256[:16], trial.distance) == ("26057", "a5d9595ef13ca615", 305)
    others = [replace(task, seed=8), replace(task, number=2), replace(task, depth=0.25), replace(task, length=701)]
    assert len({trial.sha256, *(make_trial(other, tokenizer).sha256 for other in others)}) == 5
    assert len({trial.expected, *(make_trial(other, tokenizer).expected for other in others)}) == 5


@tokenizers
@kinds
def test_the_distance_runs_from_the_first_token_of_the_value_to_the_end_of_the_question(name: str, kind: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for task in tasks(kind, 1200, SMALL, trials=1):
        trial = make_trial(task, tokenizer)
        place = trial.answer[0] - trial.distance
        said = tokenizer.decode(trial.tokens[place : place + len(trial.expected) + 2])
        assert said.lstrip(" '\"").startswith(trial.expected)
        before = tokenizer.decode(trial.tokens[:place])
        assert trial.expected not in before


def test_deeper_answers_are_nearer_and_reach_across_the_prompt() -> None:
    distances = [make_trial(task, byte_tokenizer()).distance for task in tasks(PASSKEY, 2000, SMALL, trials=1)]
    assert distances == sorted(distances, reverse=True)
    assert np.diff(distances) == pytest.approx(np.diff(distances).mean(), abs=6)
    assert len(set(PAPER_DEPTHS)) == 32
    assert len(tasks(PASSKEY, 2000, SMALL, depths=PAPER_DEPTHS, trials=PAPER_TRIALS)) == 320
    assert [len(tasks(kind, 2000, SMALL)) for kind in (PASSKEY, KEY_VALUE, JSON)] == [20, 21, 20]


@pytest.mark.parametrize(
    ("window", "frame", "room"),
    [(256, COMPACT, 32), (2047, COMPACT, 255), (2048, LITERAL, 256), (131072, LITERAL, 256)],
)
def test_the_models_window_decides_frame_and_room(window: int, frame: str, room: int) -> None:
    assert {(t.frame, t.room) for t in tasks(KEY_VALUE, 8192, window)} == {(frame, room)}
    assert {(t.frame, t.room) for t in tasks(PASSKEY, 8192, window)} == {(frame, 0)}


@kinds
@windows
def test_the_shortest_length_is_the_one_the_refusal_names(kind: str, window: int) -> None:
    tokenizer = byte_tokenizer()
    (task,) = tasks(kind, 40, window, depths=[1.0], trials=1)
    with pytest.raises(LongRopeError, match=r"needs at least (\d+) tokens, but the length is 40") as refused:
        make_trial(task, tokenizer)
    (shortest,) = re.findall(r"at least (\d+)", str(refused.value))
    # The number and so the tokenised length of what is drawn is the same for all lengths: bytes.
    assert make_trial(replace(task, length=int(shortest)), tokenizer)
    with pytest.raises(LongRopeError, match="at least"):
        make_trial(replace(task, length=int(shortest) - 1), tokenizer)


def test_a_depth_outside_the_prompt_and_a_tokenizer_without_digits_are_refused() -> None:
    with pytest.raises(LongRopeError, match="A depth is a share"):
        tasks(PASSKEY, 2048, SMALL, depths=[0.5, 50])
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "What": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token=BOS)
    with pytest.raises(LongRopeError, match="tells digits apart"):
        make_trial(tasks(PASSKEY, 2048, SMALL)[0], tokenizer)


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    budget=st.integers(0, 200),
    rate=st.floats(0.1, 5),
    guess=st.integers(-5, 99),
)
def test_most_finds_the_last_that_fits_wherever_it_begins(
    counts: list[int], budget: int, rate: float, guess: int
) -> None:
    sums = np.cumsum(counts).tolist()
    expected = max([n for n, tokens in enumerate(sums) if tokens <= budget], default=0)
    assert most(lambda n: sums[n], budget, rate, guess, range(len(sums))) == expected


def own_greedy(loaded: LoadedModel, tokens: list[int], count: int, factors: Factors | None) -> list[int]:
    """Token by token, the whole sequence each time, through transformers' own forward."""
    ids = torch.tensor([tokens])
    with loaded.under(factors), torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, loaded.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(tokens) :].tolist()


@pytest.mark.parametrize(("length", "method"), [(256, None), (400, yarn)])
def test_one_forward_decides_what_greedy_generation_does(
    reference: LoadedModel, reference_in_pieces: LoadedModel, length: int, method: Any
) -> None:
    """Whole and in pieces; against generate with its cache, and against a plain loop without one."""
    factors = None if method is None else method(reference.spec, length / 256)
    verdicts = []
    for task in (
        task for kind in (PASSKEY, KEY_VALUE, JSON) for task in tasks(kind, length, SMALL, 1, [0.0, 0.5, 1.0], 1)
    ):
        trial = make_trial(task, reference_tokenizer())
        start, end = trial.answer
        prompt, expected = trial.tokens[:start].tolist(), trial.tokens[start:end].tolist()
        right = score_trial(reference, trial, factors)
        assert score_trial(reference_in_pieces, trial, factors) == right
        said = own_greedy(reference, prompt, end - start, factors)
        assert (said == expected) == right
        assert greedy(reference, prompt, end - start, factors) == said
        verdicts.append(right)
    assert greedy(reference_in_pieces, prompt, end - start, factors) == said
    assert len(set(verdicts)) == 2 or method is None, "both verdicts must have been put to the test"


def test_a_method_that_is_entered_around_the_model_is_scored_as_it_is(reference: LoadedModel) -> None:
    factors = yarn(reference.spec, 2.0)
    trials = [make_trial(task, reference_tokenizer()) for task in tasks(PASSKEY, 400, SMALL, trials=1)]
    with reference.under(factors):
        around = [score_trial(reference, trial, None) for trial in trials]
    assert around == [score_trial(reference, trial, factors) for trial in trials]
    assert around != [score_trial(reference, trial, None) for trial in trials]


def test_the_reference_model_reads_inside_its_window(reference: LoadedModel) -> None:
    answers = []
    for kind in (PASSKEY, KEY_VALUE):
        for task in tasks(kind, 256, SMALL):
            trial = make_trial(task, reference_tokenizer())
            answers.append(Answer(task, score_trial(reference, trial, None), trial.distance, trial.chance))
    rows = {row.kind: row for row in accuracy_table(answers) if row.depth is None}
    assert rows[PASSKEY].accuracy >= 0.95
    assert rows[KEY_VALUE].low > rows[KEY_VALUE].chance
    assert rows[KEY_VALUE].accuracy >= 0.75
    passkeys = [answer for answer in answers if answer.task.kind == PASSKEY]
    assert effective_context(passkeys) == min(answer.distance for answer in passkeys if answer.task.depth == 0)


def test_the_title_is_asked_for_after_as_much_text_as_fits() -> None:
    tokenizer = byte_tokenizer()
    document = "\nOn the Rotation of Pairs\n\nText " + "of many words. " * 400
    (task,) = tasks(TITLE, 3000, LARGE, depths=[0.0], trials=1)
    trial = title_trial(task, tokenizer, document)
    assert len(trial.tokens) == 3000 - 256
    text = tokenizer.decode(trial.tokens[1:])
    before, behind = TITLE_FRAMES[LITERAL]
    assert text.startswith(before + "On the Rotation of Pairs\n\nText of many")
    assert text.endswith(behind)
    assert document.strip().startswith(text.removeprefix(before).removesuffix(behind))
    assert (trial.title, trial.distance) == ("On the Rotation of Pairs", len(text) - len(before))
    for bad, message in [(document[:200], "are to be filled"), ("Title alone", "title line"), (" \n", "title line")]:
        with pytest.raises(LongRopeError, match=message):
            title_trial(task, tokenizer, bad)


def test_a_title_is_found_in_what_the_model_writes_whatever_its_case_and_spacing(reference: LoadedModel) -> None:
    tokenizer = reference_tokenizer()
    (task,) = tasks(TITLE, 200, SMALL, depths=[0.0], trials=1)
    trial = title_trial(task, tokenizer, "Import of modules\n" + "import os\nimport sys\n" * 60)
    written = tokenizer.decode(own_greedy(reference, trial.tokens.tolist(), task.room, None), skip_special_tokens=True)
    words = written.split()
    assert len(words) > 4
    assert score_title(reference, replace(trial, title=f"{words[1].upper()}  {words[2]}\n{words[3]}"), None, tokenizer)
    assert not score_title(reference, replace(trial, title=f"{words[1]} no {words[2]}"), None, tokenizer)


def test_free_text_is_refused_where_layers_are_streamed(llama: LoadedModel) -> None:
    with pytest.raises(LongRopeError, match="stream"):
        greedy(replace(llama, stream_weights=True), [0, 5, 6], 2, None)


@given(trials=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_is_wilsons(trials: int, share: float, confidence: float) -> None:
    right = round(share * trials)
    ours = wilson_interval(right, trials, confidence)
    theirs = binomtest(right, trials).proportion_ci(confidence, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours[0] <= right / trials <= ours[1] <= 1


def answers_of(rates: dict[tuple[float, int], tuple[int, int]], length: int = 1000) -> list[Answer]:
    """(depth, distance) -> right, trials."""
    return [
        Answer(Task(PASSKEY, COMPACT, length, 0, depth, number, 0), number < right, distance, 0.25)
        for (depth, distance), (right, trials) in rates.items()
        for number in range(trials)
    ]


def test_the_table_has_a_row_a_depth_and_one_for_all() -> None:
    answers = answers_of({(0.5, 400): (3, 4), (0.0, 900): (0, 4)}) + answers_of({(0.0, 90): (4, 4)}, length=100)
    random.Random(0).shuffle(answers)
    rows = accuracy_table(answers)
    assert [(r.length, r.depth, r.right, r.trials) for r in rows] == [
        (100, 0.0, 4, 4),
        (100, None, 4, 4),
        (1000, 0.0, 0, 4),
        (1000, 0.5, 3, 4),
        (1000, None, 3, 8),
    ]
    assert (rows[-1].accuracy, rows[-1].chance) == (3 / 8, 0.25)
    assert (rows[-1].low, rows[-1].high) == wilson_interval(3, 8)
    assert accuracy_table([]) == []


def test_the_effective_context_ends_before_the_first_distance_that_falls_short() -> None:
    rates = {(0.9, 100): (10, 10), (0.6, 400): (2, 10), (0.3, 700): (1, 10), (0.0, 990): (10, 10)}
    assert effective_context(answers_of(rates)) == 400  # 20%: the paper's threshold, included
    assert effective_context(answers_of(rates), 0.21) == 100
    assert effective_context(answers_of(rates), 0.1) == 990
    assert effective_context(answers_of({(0.9, 100): (1, 10), (0.0, 990): (10, 10)})) == 0
    assert effective_context([]) == 0


def test_answers_survive_being_stored_as_json() -> None:
    for answer in answers_of({(0.5, 400): (1, 2)}):
        stored = json.loads(json.dumps(asdict(answer)))
        assert Answer(**{**stored, "task": Task(**stored["task"])}) == answer


def test_trials_of_a_title_say_what_they_are() -> None:
    trial = TitleTrial(Task(TITLE, LITERAL, 10, 2, 0.0, 0, 0), np.array([0, 1], np.uint32), "t", 2)
    assert trial.chance == 0
    assert trial.sha256 == replace(trial, title="other").sha256
