"""A fine-tuning stage against a plain training loop, and its result after kills against that of an unbroken run."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCABULARY, WINDOW, own_loss, window, write_model

from searcher.errors import LongRopeError
from searcher.rope import Factors
from searcher.tuning import Tuning
from workers import training_loss
from workers.checkpoints import Checkpoint
from workers.finetune import TuneRequest, tune
from workers.memo import replaced_forward
from workers.model import ModelRequest, load_model, load_tokenizer
from workers.packing import Chunks, TokenArray, pack
from workers.perplexity import negative_log_likelihood
from workers.training_loss import loss_forward, trained_under
from workers.tuned import check_tuned

LENGTH = 2 * WINDOW
FACTORS = Factors(tuple(np.geomspace(1.0, 2.5, 8).tolist()), n_hat=4, attention_factor=1.1)
TUNING = Tuning(
    length=LENGTH,
    steps=4,
    learning_rate=1e-2,
    warmup=1,
    batch=4,
    micro_batch=2,
    weight_decay=0.1,
    dtype="float32",
    save_every=2,
    evaluate_every=3,
)
HELD_OUT = [window(LENGTH, seed) for seed in (100, 101, 102)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


def text(seed: int = 0) -> list[TokenArray]:
    """Documents with something to learn in them: each repeats a few tokens of its own."""
    rng = np.random.default_rng(seed)
    return [
        rng.choice(rng.integers(2, VOCABULARY, 6), size).astype(np.uint32) for size in rng.integers(20, 200, size=20)
    ]


def chunks(length: int = LENGTH) -> Chunks:
    return pack(text(), length, 0, 1, seed=0)


class Driver:
    """What a driver records, in memory."""

    def __init__(self) -> None:
        self.logs: dict[tuple[int, str], float] = {}
        self.told: list[tuple[int, str]] = []
        self.checkpoints: list[Checkpoint] = []
        self.folders: list[list[str]] = []

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.told += [(step, name) for name in values]
        self.logs |= {(step, name): value for name, value in values.items()}

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)
        self.folders.append(sorted(path.name for path in checkpoint.path.parent.glob("checkpoint-*")))

    def run(
        self, request: TuneRequest, resume: Checkpoint | None = None, held_out: list[TokenArray] | None = None
    ) -> Path:
        tuning = request.tuning
        short = chunks(WINDOW) if tuning.mixed_window else None
        windows = HELD_OUT if held_out is None else held_out
        return tune(request, chunks(), short, windows, self.on_log, self.on_checkpoint, resume)


def request(base: Path, work: Path, **changes: Any) -> TuneRequest:
    return TuneRequest(str(base), replace(TUNING, **changes), FACTORS, work, device="cpu")


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Driver]:
    """The folder of a stage that ran to its end, and what was recorded of it."""
    work, driver = tmp_path_factory.mktemp("unbroken"), Driver()
    driver.run(request(base, work))
    return work, driver


@pytest.fixture
def left(unbroken: tuple[Path, Driver], tmp_path: Path) -> tuple[Path, Checkpoint]:
    """A copy of that folder to do harm to, with its last checkpoint."""
    work, last = tmp_path / "left", unbroken[1].checkpoints[-1]
    shutil.copytree(unbroken[0], work)
    return work, replace(last, path=work / last.path.name)


def weights(work: Path) -> bytes:
    return (work / "model/model.safetensors").read_bytes()


def loaded(folder: Path, length: int = LENGTH, dtype: str = "float32") -> Any:
    return load_model(ModelRequest(str(folder), length, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_loss_in_pieces_is_the_models_own_and_so_are_its_gradients(
    family: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loss, "logits_at_once", lambda _device: 20 * VOCABULARY)
    monkeypatch.setattr(training_loss, "TOKENS_AT_ONCE", 24)
    model = loaded(write_model(tmp_path, family), WINDOW)
    model.model.requires_grad_(True)
    ids = torch.as_tensor(np.stack([window(WINDOW, seed) for seed in (1, 2)]).astype(np.int64))
    factors = Factors(tuple(np.linspace(1, 2, model.spec.pairs).tolist()), 3, 1.05)

    with model.under(factors):
        own = model.model(input_ids=ids, labels=ids, use_cache=False).loss
        expected = torch.autograd.grad(own, list(model.model.parameters()), allow_unused=True)
    with trained_under(model, factors, again):
        loss = model.model(input_ids=ids)["loss"]
        found = torch.autograd.grad(loss, list(model.model.parameters()), allow_unused=True)

    assert loss.item() == pytest.approx(own.item(), rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_short_windows_are_rotated_by_the_models_own_rope(base: Path) -> None:
    model = loaded(base)
    tokens = window(WINDOW)
    ids = torch.as_tensor(tokens.astype(np.int64))[None]
    with replaced_forward(model.model, loss_forward(model, FACTORS)), torch.no_grad():
        short, long = (float(model.model(input_ids=ids, short=kind)["loss"]) for kind in (True, False))
    assert short == pytest.approx(own_loss(model.model, tokens), rel=1e-6)
    with model.under(FACTORS):
        assert long == pytest.approx(own_loss(model.model, tokens), rel=1e-6)
    assert abs(short - long) > 1e-3


def plain_loop(base: Path, tuning: Tuning, batches: list[list[tuple[TokenArray, bool]]]) -> dict[str, torch.Tensor]:
    """The stage written out: mean loss of the batch, gradients cut to norm 1, AdamW, warm-up and linear decay."""
    model = loaded(base)
    parameters = [p for p in model.model.parameters() if p.requires_grad_(True) is not None]
    decayed = [p for name, p in model.model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": tuning.weight_decay}, {"params": others, "weight_decay": 0.0}], lr=1.0
    )
    for step, batch in enumerate(batches):
        rise = step / tuning.warmup if step < tuning.warmup else 1.0
        fall = (tuning.steps - step) / (tuning.steps - tuning.warmup)
        for group in optimizer.param_groups:
            group["lr"] = tuning.learning_rate * min(rise, fall)
        optimizer.zero_grad()
        for rows, short in batch:
            ids = torch.as_tensor(rows.astype(np.int64))
            with model.under(None if short else FACTORS):
                loss = model.model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, tuning.max_grad_norm)
        optimizer.step()
    return {name: value.detach() for name, value in model.model.state_dict().items()}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_stage_is_the_plain_training_loop_under_the_factors(base: Path, tmp_path: Path, share: float) -> None:
    stage = request(base, tmp_path, mixed_window=share)
    result = Driver().run(stage)
    long, short, size = chunks(), chunks(WINDOW), TUNING.micro_batch
    rows = [(np.stack([long[size * i + row] for row in range(size)]), False) for i in range(TUNING.steps * 2)]
    if share:  # every second micro-batch: of each long chunk's place, two short windows
        brief = [(np.stack([short[4 * i + row] for row in range(4)]), True) for i in range(TUNING.steps)]
        rows = [pair for both in zip(rows, brief, strict=False) for pair in both]
    batches = [rows[2 * step : 2 * step + 2] for step in range(TUNING.steps)]
    expected = plain_loop(base, stage.tuning, batches)
    found = load_file(result / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert set(found) == set(before)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4)
        assert (value - before[name]).abs().max() > 10 * (value - expected[name]).abs().max()


def test_what_is_reported_is_the_loss_the_rate_and_the_perplexity_of_the_result(
    base: Path, unbroken: tuple[Path, Driver]
) -> None:
    work, driver = unbroken
    assert [step for step, name in driver.told if name == "loss"] == [1, 2, 3, 4]
    assert [step for step, name in driver.told if name == "held_out_perplexity"] == [0, 3, 4]
    assert [driver.logs[step, "learning_rate"] for step in (1, 2, 3, 4)] == pytest.approx([0, 1e-2, 2e-2 / 3, 1e-2 / 3])
    for folder, step in ((base, 0), (work / "model", 4)):
        model = loaded(folder)
        scored = [negative_log_likelihood(model, tokens, FACTORS) for tokens in HELD_OUT]
        expected = math.exp(sum(nats for nats, _ in scored) / sum(count for _, count in scored))
        assert driver.logs[step, "held_out_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert driver.logs[4, "loss"] < driver.logs[1, "loss"]


def test_the_result_is_an_ordinary_folder_with_the_base_models_config(tmp_path: Path) -> None:
    """In the base model's dtype, so that the next search's L0 and lambdas mean what they meant."""
    base = write_model(tmp_path / "base", "llama", dtype="bfloat16")
    result = Driver().run(request(base, tmp_path / "work"))
    assert (result / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert {value.dtype for value in load_file(result / "model.safetensors").values()} == {torch.bfloat16}
    assert load_tokenizer(result).get_vocab() == load_tokenizer(base).get_vocab()
    assert loaded(result, dtype="auto").spec == loaded(base, dtype="auto").spec
    check_tuned(result, base)


def test_an_older_checkpoint_goes_only_after_the_newer_is_recorded(unbroken: tuple[Path, Driver]) -> None:
    work, driver = unbroken
    assert [checkpoint.step for checkpoint in driver.checkpoints] == [2, 4]
    assert driver.folders == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not list((work / "unfinished").glob("*"))


CHANGES = {
    "full": {},
    "lora": {"lora_rank": 4},
    "mixed": {"mixed_window": 0.5, "gradient_checkpointing": False},
}


class Interrupted(Exception):
    """In a kill's place, where no process is needed."""


@pytest.mark.parametrize("kind", CHANGES)
def test_a_stage_resumed_from_a_checkpoint_ends_with_the_same_bits(base: Path, tmp_path: Path, kind: str) -> None:
    whole, first, second = Driver(), Driver(), Driver()
    expected = whole.run(request(base, tmp_path / "whole", **CHANGES[kind]))
    stage = request(base, tmp_path / "broken", **CHANGES[kind])

    def stop(step: int, values: Mapping[str, float]) -> None:
        Driver.on_log(first, step, values)
        if step == 3:
            raise Interrupted

    first.on_log = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        first.run(stage)
    torch.manual_seed(99)  # of another process
    result = second.run(stage, first.checkpoints[-1])
    assert (result / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    # What comes again has the values it had, so that keying by step and name stores each once.
    assert first.logs.keys() & second.logs.keys()
    assert first.logs | second.logs == second.logs | first.logs == whole.logs


def test_a_resume_skips_to_its_data_without_reading_what_came_before(base: Path, tmp_path: Path) -> None:
    driver, stage, read = Driver(), request(base, tmp_path, save_every=3), []

    class Recording(Chunks):
        def __getitem__(self, index: int) -> TokenArray:
            read.append(index)
            return super().__getitem__(index)

    def stop(checkpoint: Checkpoint) -> None:
        driver.on_checkpoint(checkpoint)
        raise Interrupted

    with pytest.raises(Interrupted):
        tune(stage, chunks(), None, [], driver.on_log, stop)
    recording = Recording(text(), LENGTH, 0, 1, seed=0)
    tune(stage, recording, None, [], driver.on_log, driver.on_checkpoint, driver.checkpoints[0])
    assert read == [12, 13, 14, 15]


def test_a_stage_killed_while_it_writes_its_result_needs_no_more_steps(
    base: Path, left: tuple[Path, Checkpoint]
) -> None:
    work, last = left
    expected, again = weights(work), Driver()
    (work / "model").rename(work / "unfinished/model")
    again.run(request(base, work), last)
    assert weights(work) == expected
    assert again.told == []


def test_what_was_not_recorded_is_never_resumed_from(base: Path, unbroken: tuple[Path, Driver], tmp_path: Path) -> None:
    """The Trainer's own search would take the highest number, whole or not."""
    for name in ("checkpoint-3", "checkpoint-4", "unfinished/checkpoint-2", "model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"cut off")
    Driver().run(request(base, tmp_path), held_out=[])
    assert weights(tmp_path) == weights(unbroken[0])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def cut_off(path: Path) -> None:
    os.truncate(path / "optimizer.pt", (path / "optimizer.pt").stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def lose_a_file(path: Path) -> None:
    (path / "rng_state.pth").unlink()


def add_a_file(path: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(b"code")


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, lose_a_file, add_a_file, shutil.rmtree])
def test_a_checkpoint_that_is_not_what_was_recorded_is_refused(
    base: Path, left: tuple[Path, Checkpoint], damage: Callable[[Path], None]
) -> None:
    work, last = left
    damage(last.path)
    with pytest.raises(LongRopeError, match=r"cut off, changed or missing|is gone"):
        Driver().run(request(base, work), last)


def test_a_checkpoint_of_other_settings_is_refused(base: Path, left: tuple[Path, Checkpoint]) -> None:
    work, last = left
    for other in (
        request(base, work, learning_rate=1e-3),
        replace(request(base, work), factors=Factors((2.0,) * 8)),
        replace(request(base, work), factors=None),
    ):
        with pytest.raises(LongRopeError, match="other settings or factors"):
            Driver().run(other, last)


def stage_process(base: str, work: str, record: str, last_words: int | None) -> None:
    """A driver that keeps its record in a file, in a process that can be killed."""
    torch.set_num_threads(1)
    told = 0

    def tell(*_: Any) -> None:
        nonlocal told
        told += 1
        if told == last_words:  # so also between a checkpoint's last rename and its record
            os.kill(os.getpid(), signal.SIGKILL)

    def keep(checkpoint: Checkpoint) -> None:
        tell()
        unfinished = Path(f"{record}.part")
        unfinished.write_text(json.dumps([checkpoint.step, str(checkpoint.path), checkpoint.sha256]))
        unfinished.replace(record)

    resume = None
    if Path(record).exists():
        step, path, sha256 = json.loads(Path(record).read_text())
        resume = Checkpoint(step, Path(path), sha256)
    stage = request(Path(base), Path(work), steps=6, save_every=2, evaluate_every=4)
    tune(stage, chunks(), None, HELD_OUT, tell, keep, resume)


@pytest.fixture(scope="module")
def server() -> Any:
    """Processes that come with everything imported, from a server without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workers.finetune", "transformers.trainer", "accelerate", "tiny_models"])
    return context


@pytest.mark.slow
def test_a_stage_killed_at_random_instants_ends_with_the_bits_of_one_that_was_not(
    base: Path, tmp_path: Path, server: Any
) -> None:
    def start(name: str, last_words: int | None = None) -> Any:
        places = str(base), str(tmp_path / name), str(tmp_path / f"{name}.json"), last_words
        process = server.Process(target=stage_process, args=places)
        process.start()
        return process

    start("warm", last_words=1).join()
    began = time.monotonic()
    whole = start("whole")
    whole.join()
    seconds = time.monotonic() - began
    assert whole.exitcode == 0

    draw = random.Random(int.from_bytes(os.urandom(4)))
    codes = []
    for last_words in (None, 4, None, 3, None, 5, None):
        process = start("broken", last_words)
        process.join(None if last_words else draw.uniform(0.2, 1.0) * seconds)
        process.kill()
        process.join()
        codes.append(process.exitcode)
    last = start("broken")
    last.join()
    assert last.exitcode == 0
    assert codes.count(-signal.SIGKILL) >= 2
    found, expected = (tmp_path / name / "model/model.safetensors" for name in ("broken", "whole"))
    assert found.read_bytes() == expected.read_bytes()


def test_lora_changes_linear_maps_alone_and_is_merged(base: Path, tmp_path: Path) -> None:
    result = Driver().run(request(base, tmp_path, lora_rank=4, lora_alpha=16))
    before, after = load_file(base / "model.safetensors"), load_file(result / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    for name in changed:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 4


def test_autocast_stays_near_float32_and_can_follow_it_in_one_process(
    base: Path, unbroken: tuple[Path, Driver], tmp_path: Path
) -> None:
    single, half = unbroken[1], Driver()
    half.run(request(base, tmp_path, dtype="bfloat16"))
    for step in (1, 2, 3, 4):
        assert half.logs[step, "loss"] == pytest.approx(single.logs[step, "loss"], rel=0.02)
    assert half.logs[4, "loss"] != single.logs[4, "loss"]
    assert torch.load(tmp_path / "checkpoint-4/optimizer.pt")["state"][0]["exp_avg"].dtype == torch.float32


def test_without_factors_a_stage_is_direct_fine_tuning(base: Path, tmp_path: Path) -> None:
    driver = Driver()
    driver.run(replace(request(base, tmp_path), factors=None))
    own = np.mean([own_loss(loaded(base).model, tokens) for tokens in HELD_OUT])
    assert driver.logs[0, "held_out_perplexity"] == pytest.approx(math.exp(own), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_stage_with_advice(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match=r"not finite at step .* a lower learning rate"):
        Driver().run(request(base, tmp_path, learning_rate=1e30, warmup=0), held_out=[])


def test_data_that_does_not_fit_the_stage_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, stage = Driver(), request(base, tmp_path)
    ends = driver.on_log, driver.on_checkpoint
    with pytest.raises(LongRopeError, match=f"must have {LENGTH} tokens, not 64"):
        tune(stage, chunks(64), None, [], *ends)
    with pytest.raises(LongRopeError, match=f"must have {LENGTH} tokens, not 64"):
        tune(stage, chunks(), None, [window(64)], *ends)
    with pytest.raises(LongRopeError, match="belong to mixed_window"):
        tune(stage, chunks(), chunks(WINDOW), [], *ends)
    with pytest.raises(LongRopeError, match="original length, 64 tokens, not 32"):
        tune(request(base, tmp_path, mixed_window=0.5), chunks(), chunks(32), [], *ends)
    with pytest.raises(LongRopeError, match="FSDP shards a model over several GPUs"):
        tune(request(base, tmp_path, fsdp={}), chunks(), None, [], *ends)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LongRopeError, match="multiple of 6"):
        tune(stage, chunks(), None, [], *ends)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def scale_rope(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0})


def lengthen(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=4 * WINDOW)


def rebase(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "model.safetensors")


def drop_the_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def swap_tokens(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (scale_rope, "rope_parameters.* copy .*config.json"),
        (lengthen, "max_position_embeddings"),
        (rebase, "rope_parameters"),
        (drop_a_tensor, "merge adapters"),
        (drop_the_tokenizer, "no tokenizer"),
        (swap_tokens, "tokenizer files"),
    ],
)
def test_a_model_tuned_elsewhere_must_be_the_base_models_kin(
    base: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(base, tmp_path / "tuned")
    edit_config(folder, dtype="bfloat16", use_cache=False, transformers_version="4.0.0")  # no matter
    check_tuned(folder, base)
    damage(folder)
    with pytest.raises(LongRopeError, match=said):
        check_tuned(folder, base)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_two_workers_of_a_cluster_give_what_one_process_gives_up_to_rounding(
    base: Path, unbroken: tuple[Path, Driver], tmp_path: Path
) -> None:
    import ray

    from workers.actor import start_cluster
    from workers.scorer import PoolRequest
    from workers.train_cluster import tune_on_cluster

    (work, single), driver, again = unbroken, Driver(), Driver()
    expected = load_file(work / "model/model.safetensors")
    stage, pool = request(base, tmp_path), PoolRequest(workers=2, gpus_per_worker=0)

    def stop(step: int, values: Mapping[str, float]) -> None:
        Driver.on_log(driver, step, values)
        if step == 3:
            raise Interrupted

    start_cluster(2)
    try:
        with pytest.raises(Interrupted):
            tune_on_cluster(stage, chunks(), None, HELD_OUT, stop, driver.on_checkpoint, pool)
        assert [checkpoint.step for checkpoint in driver.checkpoints] == [2]
        ends = again.on_log, again.on_checkpoint, pool
        result = tune_on_cluster(stage, chunks(), None, HELD_OUT, *ends, driver.checkpoints[0])
        os.truncate(again.checkpoints[-1].path / "optimizer.pt", 10)
        with pytest.raises(LongRopeError, match="cut off, changed or missing"):
            tune_on_cluster(stage, chunks(), None, [], *ends, again.checkpoints[-1])
    finally:
        ray.shutdown()
    for name, value in load_file(result / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4)
    assert driver.logs | again.logs == pytest.approx(single.logs, rel=1e-3, abs=1e-6)
    assert len(again.told) == len(set(again.told))
