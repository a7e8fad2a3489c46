"""One fine-tuning stage: transformers' Trainer at fixed rescale factors, killed and resumed at will.

The model is trained and evaluated under the stage's factors, absolute against its unscaled RoPE. What is written is an
ordinary model folder whose config is the base model's, so that L0 and the meaning of lambda hold for the next search.

The loss goes over the hidden states in pieces, so that the logits of a long sequence never live at one time; decoder
layers and pieces of their feed-forward blocks are checkpoints. All this happens inside the causal model's own forward,
so that whatever wraps it (data parallelism, FSDP, LoRA) sees one ordinary call.

A step's data and rate follow from its number, the rest from what the last checkpoint holds. On one CPU with a fixed
number of threads, or on one GPU, a stage that was killed and resumed ends with the weights, bit for bit, of one that
never was. On several devices, with FSDP or without, gradients are sums in no fixed order, equal up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from searcher.errors import LongRopeError, needs
from searcher.rope import Factors
from searcher.tuning import Tuning
from workers import attention as own_attention
from workers.checkpoints import Checkpoint, folder_sha256, settle
from workers.model import LoadedModel, ModelRequest, load_model, read_config_json, resolve_folder
from workers.packing import ChunkSource, TokenArray
from workers.settings import settle_device
from workers.training_loss import TRAINING_ATTENTION, trained_under, training_attention

UNFINISHED = "unfinished"  # what is being written; of no worth after a kill
MODEL = "model"
STAGE_FILE = "stage.json"
# What a model folder holds beside its weights.
BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "*token*.json", "vocab*", "merges.txt", "chat_template*"),
    *("*.model", "*.jinja", "*.py"),
)


@dataclass(frozen=True)
class TuneRequest:
    """What to tune, and how.

    Attributes
    ----------
    model: folder of the base model, or a name on the hub.
    tuning: the stage's settings.
    factors: the rotation it is trained under, absolute; None for the model's own (direct fine-tuning).
    work: folder of this stage alone, for checkpoints and the result; with several workers, one that all of them see.
    threads: CPU threads; part of what decides the last bits.
    device: ``auto``, ``cpu``, ``cuda`` or ``mps``. Which of several GPUs is for CUDA_VISIBLE_DEVICES to say.
    sliding_window, original_length, trust_remote_code: see ``workers.model.ModelRequest``.
    """

    model: str
    tuning: Tuning
    factors: Factors | None
    work: Path
    threads: int = 1
    device: str = "auto"
    sliding_window: str | None = None
    original_length: int | None = None
    trust_remote_code: bool = False

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be resumed."""
        factors = None if self.factors is None else hashlib.sha256(self.factors.to_bytes()).hexdigest()
        return {"tuning": self.tuning.to_json(), "factors": factors}


OnLog = Callable[[int, Mapping[str, float]], None]
OnCheckpoint = Callable[[Checkpoint], None]


def tune(
    request: TuneRequest,
    chunks: ChunkSource,
    short_chunks: ChunkSource | None,
    held_out: Sequence[TokenArray],
    on_log: OnLog,
    on_checkpoint: OnCheckpoint,
    resume: Checkpoint | None = None,
) -> Path:
    """Run a stage to its end; the folder of the tuned model: ``work/model``.

    Killed at any instant, call it again with the last checkpoint that ``on_checkpoint`` was told of, or with None.
    Whatever else lies in ``work`` is not looked at. Once the caller has recorded the result, everything in ``work`` but
    ``model`` may go.

    Parameters
    ----------
    chunks: what is trained on, of ``tuning.length`` tokens; every chunk weighs the same.
    short_chunks: with ``mixed_window``, windows of L0 tokens; as many are taken at one time as fill ``length``.
    held_out: windows of ``tuning.length`` tokens, BOS included; none for no evaluation.
    on_log: called with a step and what was measured at it: ``loss`` of its batch, ``learning_rate`` and ``grad_norm``;
        ``held_out_perplexity`` under the factors, over all tokens, in another call; that also before the first step,
        as step 0. After a resume the steps since the checkpoint come again, with equal values: key what is stored by
        step and name.
    on_checkpoint: called with a checkpoint that is on the disk; it is safe to resume from once this returns. Older ones
        are deleted only then.
    resume: checked against its digest before anything of it is read.

    With several workers the two are called in the first alone.

    Raises
    ------
    LongRopeError
        The request, the data or the checkpoint cannot be used, or the loss is not finite.
    """
    tuning = request.tuning
    _check_data(tuning, chunks, short_chunks, held_out)
    folder = resolve_folder(request.model, request.trust_remote_code)
    if _first():
        request.work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(request.work / UNFINISHED, ignore_errors=True)
    if resume is not None:
        _verify(resume, request)
    last = request.work / f"checkpoint-{tuning.steps}"
    if resume is not None and resume.step == tuning.steps:
        last = resume.path
    else:
        with _deterministic():
            _train(request, chunks, short_chunks, held_out, on_log, on_checkpoint, resume)
    if _first():
        _write_model(folder, last, request)
    _together()
    return request.work / MODEL


def _check_data(
    tuning: Tuning, chunks: ChunkSource, short_chunks: ChunkSource | None, held_out: Sequence[TokenArray]
) -> None:
    if chunks.length != tuning.length:
        raise LongRopeError(f"Chunks to train on must have {tuning.length} tokens, not {chunks.length}.")
    if wrong := {len(window) for window in held_out} - {tuning.length}:
        raise LongRopeError(f"Held-out windows must have {tuning.length} tokens, not {min(wrong)}.")
    if (short_chunks is not None) != (tuning.mixed_window > 0):
        raise LongRopeError("Short windows to train on belong to mixed_window above 0, and the other way round.")
    workers = _workers()
    if tuning.micro_steps % workers:
        raise LongRopeError(
            f"The batch of {tuning.batch} chunks in micro-batches of {tuning.micro_batch} does not divide among "
            f"{workers} workers; use a batch that is a multiple of {workers * tuning.micro_batch}."
        )


def _verify(resume: Checkpoint, request: TuneRequest) -> None:
    if not resume.path.is_dir():
        raise LongRopeError(f"The checkpoint {resume.path} is gone; start the stage again, or bring it back.")
    if folder_sha256(resume.path) != resume.sha256:
        raise LongRopeError(
            f"The checkpoint {resume.path} is not what was recorded: a file in it is cut off, changed or missing. "
            "Bring it back from a copy, or start the stage again."
        )
    made_with = json.loads((resume.path / STAGE_FILE).read_text(encoding="utf-8"))
    if made_with != json.loads(json.dumps(request.identity())):
        raise LongRopeError(
            f"The checkpoint {resume.path} was made with other settings or factors than this stage's; start the stage "
            "again, or set them back."
        )


def _train(
    request: TuneRequest,
    chunks: ChunkSource,
    short_chunks: ChunkSource | None,
    held_out: Sequence[TokenArray],
    on_log: OnLog,
    on_checkpoint: OnCheckpoint,
    resume: Checkpoint | None,
) -> None:
    from transformers import Trainer, TrainerCallback, set_seed
    from transformers.trainer_callback import PrinterCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Hands what the Trainer logs and saves to the stage's observers."""

        def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
            values = _measured(logs, state.global_step)
            if values and _first():
                on_log(state.global_step, values)

        def on_save(self, args: Any, state: Any, _: Any, **__: Any) -> None:
            _together()  # every worker has written its part
            if _first():
                written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                _seal(written, request, on_checkpoint, state.global_step)
            _together()

    loaded = _load(request)
    original = loaded.spec.original_length
    if short_chunks is not None and short_chunks.length != original:
        raise LongRopeError(f"Short windows have the original length, {original} tokens, not {short_chunks.length}.")
    set_seed(request.tuning.seed % 2**32)  # numpy takes no more
    model = loaded.model if request.tuning.lora_rank is None else _with_lora(loaded.model, request.tuning)
    with trained_under(loaded, request.factors, request.tuning.gradient_checkpointing):
        trainer = Trainer(
            model,
            _arguments(request, bool(len(held_out)), resume),
            data_collator=_collate,
            train_dataset=_Order(request.tuning, chunks, short_chunks),
            eval_dataset=[{"tokens": window[None], "held_out": True} for window in held_out] or None,
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume.path))


def _measured(logs: Mapping[str, float], step: int) -> dict[str, float]:
    values = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
    if "eval_loss" in logs:
        values["held_out_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
    if not all(math.isfinite(value) for value in values.values()):
        raise LongRopeError(
            f"The loss is not finite at step {step}; start anew from a plan with a lower learning rate, or with dtype "
            "float32."
        )
    return values


def _seal(written: Path, request: TuneRequest, on_checkpoint: OnCheckpoint, step: int) -> None:
    """A checkpoint of the Trainer's made whole, told of, and only then the only one."""
    (written / "training_args.bin").unlink(missing_ok=True)  # a pickle of paths, which nothing reads
    (written / STAGE_FILE).write_text(json.dumps(request.identity(), indent=1, sort_keys=True), encoding="utf-8")
    final = request.work / written.name
    digest = folder_sha256(written)
    settle(written, final)
    on_checkpoint(Checkpoint(step, final, digest))
    for other in request.work.glob("checkpoint-*"):
        if other != final:
            shutil.rmtree(other)


def _arguments(request: TuneRequest, evaluated: bool, resume: Checkpoint | None) -> Any:
    """The stage's settings in the Trainer's words."""
    from transformers import TrainingArguments

    tuning, device = request.tuning, settle_device(request.device)
    if device.index is not None:
        raise LongRopeError(f"Name the GPU to tune on with CUDA_VISIBLE_DEVICES, and the device cuda, not {device}.")
    if tuning.fsdp is not None and (device.type != "cuda" or _workers() < 2):  # accelerate would not say so
        raise LongRopeError(
            f"FSDP shards a model over several GPUs, but this stage has {_workers()} worker(s) on {device.type}; leave "
            "fsdp out."
        )
    arguments = TrainingArguments(
        output_dir=str(request.work / UNFINISHED),
        max_steps=tuning.steps,
        per_device_train_batch_size=tuning.micro_batch,
        gradient_accumulation_steps=tuning.micro_steps // _workers(),
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="constant_with_warmup" if tuning.schedule == "constant" else tuning.schedule,
        warmup_steps=tuning.warmup,
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.max_grad_norm,
        optim=tuning.optimizer,
        bf16=tuning.dtype == "bfloat16",
        seed=tuning.seed % 2**32,
        save_strategy="steps",
        save_steps=tuning.save_every,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=tuning.evaluate_every,
        eval_on_start=evaluated and resume is None,
        per_device_eval_batch_size=1,
        prediction_loss_only=True,
        average_tokens_across_devices=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device.type == "cpu" and _workers() > 1 else None,
        use_cpu=device.type == "cpu",
        fsdp=tuning.fsdp is not None,
        fsdp_config=None if tuning.fsdp is None else dict(tuning.fsdp),
    )
    # One process drives one GPU; without this the Trainer takes all it sees, by nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Order:
    """Which chunk is the stage's i-th, counted over steps: a function of i, so that a resume skips without reading."""

    def __init__(self, tuning: Tuning, chunks: ChunkSource, short_chunks: ChunkSource | None) -> None:
        self._tuning, self._chunks, self._short = tuning, chunks, short_chunks

    def __len__(self) -> int:
        return self._tuning.steps * self._tuning.batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One chunk, (1, L), or the short windows in its place, (L // L0, L0); a micro-batch has one kind."""
        size = self._tuning.micro_batch
        micro, row = divmod(index, size)
        short_so_far = math.floor(micro * self._tuning.mixed_window)
        if self._short is None or math.floor((micro + 1) * self._tuning.mixed_window) == short_so_far:
            return {"tokens": self._chunks[(micro - short_so_far) * size + row][None]}
        count = max(1, self._tuning.length // self._short.length)
        first = (short_so_far * size + row) * count
        return {"tokens": np.stack([self._short[first + i] for i in range(count)]), "short": True}


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ids = torch.from_numpy(np.concatenate([item["tokens"] for item in items]).astype(np.int64))
    batch: dict[str, Any] = {"input_ids": ids, "short": items[0].get("short", False)}
    # The Trainer asks a model for a loss where there are labels; while training they would have it scale the loss too.
    return {**batch, "labels": ids} if items[0].get("held_out") else batch


def _load(request: TuneRequest) -> LoadedModel:
    """The base model in float32 on the CPU, from where the Trainer moves it."""
    loaded = load_model(
        ModelRequest(
            path=request.model,
            target_length=request.tuning.length,
            dtype="float32",
            device="cpu",
            sliding_window=request.sliding_window,
            original_length=request.original_length,
            threads=request.threads,
            trust_remote_code=request.trust_remote_code,
        )
    )
    if loaded.settings["attention"] == own_attention.NAME:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(TRAINING_ATTENTION, training_attention)
        AttentionMaskInterface.register(TRAINING_ATTENTION, own_attention.no_mask)
        loaded.model.set_attn_implementation(TRAINING_ATTENTION)
    loaded.model.requires_grad_(True)
    return loaded


def peft_package() -> Any:
    """The peft package.

    Raises
    ------
    LongRopeError
        It is not installed.
    """
    with needs("A fine-tuning with LoRA", "peft", "lora"):
        import peft
    return peft


def _with_lora(model: Any, tuning: Tuning) -> Any:
    peft = peft_package()
    rank = tuning.lora_rank or 0
    alpha = 2 * rank if tuning.lora_alpha is None else tuning.lora_alpha
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))


@contextmanager
def _deterministic() -> Iterator[None]:
    """Equal bits, where one device can give them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA refuses; read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # every torch.empty would be written twice
    torch.use_deterministic_algorithms(True, warn_only=_workers() > 1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def _write_model(base: Path, last: Path, request: TuneRequest) -> None:
    """The last checkpoint's weights, LoRA merged, in the base model's dtype; all else is the base model's."""
    from transformers import AutoModelForCausalLM

    lora = request.tuning.lora_rank is not None
    model = AutoModelForCausalLM.from_pretrained(
        base if lora else last, dtype=torch.float32, trust_remote_code=request.trust_remote_code
    )
    if lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, last).merge_and_unload()
    config = read_config_json(base)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    written = request.work / UNFINISHED / MODEL
    shutil.rmtree(written, ignore_errors=True)
    model.to(getattr(torch, stored)).save_pretrained(written)
    for path in (path for pattern in BESIDE_WEIGHTS for path in base.glob(pattern)):
        if not path.name.endswith(".index.json"):  # of the base model's own shards
            shutil.copyfile(path, written / path.name)
    settle(written, request.work / MODEL)


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _workers() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _together() -> None:
    """Wait for all workers, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
