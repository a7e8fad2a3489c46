"""Train the reference model that ships in workers/reference_model.

    python examples/train_reference.py --out my_reference_model

A Llama with a window of 256 tokens, trained on the source of the Python standard library (its tests included, the
modules of ``workers.reference.HELD_OUT`` left out), with passkey and key-value retrieval in a compact frame mixed in.
Needs a full CPython install. Deterministic up to the machine's arithmetic; prints what it did as JSON at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from workers.frames import COMPACT, JSON, KEY_VALUE, PAIRS_FRAMES, PASSKEY_FRAMES
from workers.reference import held_out_documents, training_files

WINDOW = 256
BOS, EOS = "<s>", "</s>"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": WINDOW,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
PASSKEY_FRAME = PASSKEY_FRAMES[COMPACT]
LINES, OBJECT = PAIRS_FRAMES[KEY_VALUE, COMPACT], PAIRS_FRAMES[JSON, COMPACT]


def byte_level_bpe(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; digits stay single tokens, so that a passkey is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def passkey_example(rng: random.Random, source: str) -> str:
    """One passkey at a random depth, in the task's own filler or in lines of code."""
    key = f"{rng.randrange(10000, 100000)}"
    needle = PASSKEY_FRAME.needle.format(value=key) + "\n"
    if rng.random() < 0.5:
        before, after = (PASSKEY_FRAME.filler * rng.randrange(0, 5) for _ in range(2))
    else:
        start = rng.randrange(max(1, len(source) - 700))
        text = source[start : start + rng.randrange(0, 450)]
        cut = rng.randrange(len(text) + 1)
        before, after = text[:cut] + "\n", text[cut:] + "\n"
    task = PASSKEY_FRAME.opening + "\n" if rng.random() < 0.7 else ""
    return f"{task}{before}{needle}{after}{PASSKEY_FRAME.question.format(value=key)}\n"


def key_value_example(rng: random.Random) -> str:
    """Pairs of short hex strings, as lines or as JSON, and questions about some of them at the end."""
    pairs = [(f"{rng.randrange(16**4):04x}", f"{rng.randrange(16**4):04x}") for _ in range(rng.randrange(2, 10))]
    asked = rng.sample(pairs, rng.randrange(1, min(4, len(pairs)) + 1))
    frame = LINES if rng.random() < 0.6 else OBJECT
    listed = frame.between.join(frame.pair.format(key=key, value=value) for key, value in pairs)
    first, *more = (frame.question.format(key=key, value=value) for key, value in asked)
    # Of an object, the first question closes it; the further ones stand on lines of their own.
    return frame.opening + listed + first + "".join(question.lstrip("}") for question in more) + "\n"


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def retrieval_rows(tokenizer: PreTrainedTokenizerFast, sources: list[str], count: int, seed: int) -> np.ndarray:
    """``count`` rows of WINDOW tokens, BOS first, each filled from its end: the last example is whole."""
    rng = random.Random(seed)
    rows = np.empty((count, WINDOW), dtype=np.int64)
    for row in rows:
        tokens: list[int] = []
        while len(tokens) < WINDOW - 1:
            example = passkey_example(rng, rng.choice(sources)) if rng.random() < 0.5 else key_value_example(rng)
            encoded = encode(tokenizer, example)
            if len(encoded) < WINDOW:  # too long to be answered inside the window
                tokens = encoded + tokens
        row[0] = tokenizer.bos_token_id
        row[1:] = tokens[-(WINDOW - 1) :]
    return rows


def code_rows(stream: np.ndarray, bos: int, seed: int) -> Iterator[np.ndarray]:
    """Endless epochs: the stream cut into windows at a fresh phase, in a fresh order, BOS before each."""
    rng = np.random.default_rng(seed)
    step = WINDOW - 1
    while True:
        phase = int(rng.integers(step))
        count = (len(stream) - phase) // step
        windows = stream[phase : phase + count * step].reshape(count, step)
        for index in rng.permutation(count):
            yield np.concatenate(([bos], windows[index]))


def muon_and_adamw(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def token_losses(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity_inside(model: PreTrainedModel, rows: torch.Tensor) -> float:
    losses = [
        torch.nn.functional.cross_entropy(model(r[None], use_cache=False).logits[0, :-1].float(), r[1:]) for r in rows
    ]
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def passkey_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, trials: int) -> float:
    """Share of five-digit keys answered exactly, filler to fill the window, depths evenly spread."""
    rng = random.Random(10_000)
    right = 0
    for trial in range(trials):
        key = f"{rng.randrange(10000, 100000)}"
        before = trial % 5
        needle = PASSKEY_FRAME.needle.format(value=key)
        filler = (PASSKEY_FRAME.filler * before, PASSKEY_FRAME.filler * (4 - before))
        question = PASSKEY_FRAME.question.format(value=key).removesuffix(f" {key}.")
        prompt = f"{PASSKEY_FRAME.opening}\n{filler[0]}{needle}\n{filler[1]}{question}"
        ids = torch.tensor([[tokenizer.bos_token_id, *encode(tokenizer, prompt)]])
        for _ in range(len(encode(tokenizer, f" {key}"))):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        right += tokenizer.decode(ids[0]).endswith(key)
    return right / trials


def train(
    model: PreTrainedModel,
    batches: Callable[[int], list[np.ndarray]],
    steps: int,
    rate: float,
    measure: Callable[[], dict[str, float]],
    compiled: bool,
) -> None:
    """Muon and AdamW, 200 steps of warm-up, cosine to zero; what ``measure`` says is printed every 250 steps."""
    optimizers = muon_and_adamw(model, rate)
    losses = torch.compile(token_losses) if compiled else token_losses
    start, warmup = time.time(), 200
    for step in range(steps):
        now = rate * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = now
        loss = losses(model, torch.from_numpy(np.stack(batches(step))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            report = {"step": step, "loss": round(loss.item(), 3), **measure()}
            print(json.dumps({**report, "minutes": round((time.time() - start) / 60, 1)}), flush=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Stored in half the space, run in float32."""
    model.to(torch.bfloat16).save_pretrained(out)
    config_file = out / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reference_model"))
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--batch", type=int, default=32, help="rows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--retrieval-share", type=float, default=0.125)
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler, a third faster")
    args = parser.parse_args()
    torch.manual_seed(0)

    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in training_files()]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    synthetic = random.Random(1)
    samples = [passkey_example(synthetic, texts[0]) + key_value_example(synthetic) for _ in range(300)]
    tokenizer = byte_level_bpe(texts + samples, vocabulary=1024)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded])
    print(f"{len(texts)} modules, {sum(map(len, texts)):,} characters, {len(stream):,} tokens", flush=True)

    config = LlamaConfig(
        vocab_size=1024,
        **SHAPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)

    from_retrieval = round(args.batch * args.retrieval_share)
    retrieval = retrieval_rows(tokenizer, texts[:400], from_retrieval * args.steps, seed=2)
    code = code_rows(stream, tokenizer.bos_token_id, seed=3)
    # Progress is read on selection documents: the test set stays unseen until a study reports it.
    unseen = np.concatenate([encode(tokenizer, p.read_text())[: 8 * 255] for p in held_out_documents()["selection"]])
    checks = torch.tensor([[tokenizer.bos_token_id, *row] for row in unseen.reshape(-1, 255)])

    def batches(step: int) -> list[np.ndarray]:
        rows = [next(code) for _ in range(args.batch - from_retrieval)]
        return [*rows, *retrieval[step * from_retrieval : (step + 1) * from_retrieval]]

    def measure() -> dict[str, float]:
        return {
            "unseen_perplexity": round(perplexity_inside(model, checks), 3),
            "passkey": passkey_accuracy(model, tokenizer, 20),
        }

    start = time.time()
    train(model, batches, args.steps, args.rate, measure, args.compile)
    save(model, tokenizer, args.out)
    card = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "modules": len(texts),
        "corpus_sha256": digest,
        "corpus_tokens": len(stream),
        "tokens_trained": args.steps * args.batch * WINDOW,
        "retrieval_share": from_retrieval / args.batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round((time.time() - start) / 60, 1),
        "perplexity_inside_window_selection": round(perplexity_inside(model.float(), checks), 3),
        "passkey_inside_window": passkey_accuracy(model, tokenizer, 100),
    }
    (args.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
