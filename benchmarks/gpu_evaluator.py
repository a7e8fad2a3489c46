"""The evaluator on one GPU: a model of Llama-3-8B's shape with random weights in bfloat16, up to two million tokens.

    python benchmarks/gpu_evaluator.py

For each length: seconds, tokens a second, the share of the card's bfloat16 matrix rate (measured first), and peak
memory; transformers' own ``model(ids, labels=ids)`` where it fits; and one refinement step at 128k. From 1M tokens on,
two of the 32 layers run at full length: their peak is measured, and the time of all is scaled from theirs and labelled
so; ``--whole`` runs all 32. Needs torch, transformers and numpy only. Writes gpu_evaluator.json and gpu_evaluator.md.
``--tiny`` is for trying the script itself, on any device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs without an installation

from searcher.baselines import yarn
from searcher.rope import RopeSpec
from workers import attention, engine
from workers.apply import HALF_SPLIT
from workers.model import LoadedModel
from workers.perplexity import negative_log_likelihood
from workers.refine import loss_and_gradient

K = 1024
SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY: dict[str, Any] = {
    **SHAPE,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FEW = 2  # layers of the lengths that are scaled


def build(shape: dict[str, Any], device: torch.device, attention: str) -> LlamaForCausalLM:
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def ours(model: LlamaForCausalLM, chunk: int, hidden_on_host: bool) -> LoadedModel:
    config = model.config
    spec = RopeSpec(
        500000.0,
        config.hidden_size // config.num_attention_heads,
        config.max_position_embeddings,
        config.num_hidden_layers,
    )
    return LoadedModel(
        model, spec, None, "half-split", HALF_SPLIT, True, {}, chunk=chunk, hidden_on_host=hidden_on_host
    )


def measured(function: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float] | None:
    """Fastest seconds, and peak GiB beyond nothing; None where it does not fit."""
    best, peak = float("inf"), 0.0
    try:
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peak = torch.cuda.max_memory_allocated(device) / 2**30
            best = min(best, time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return None
    return best, peak


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOPs a second of a square bfloat16 product, the fastest of 20."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    found = measured(partial(torch.matmul, a, b), device, 20)
    assert found is not None
    return 2 * size**3 / found[0]


def forward(model: LlamaForCausalLM, ids: torch.Tensor) -> Any:
    """Transformers' own way to a loss."""
    with torch.inference_mode():
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def work(model: LlamaForCausalLM, length: int) -> float:
    """FLOPs of a causal forward: 2 n^2 d layers of attention, 2 n a weight of the linear maps, with the head's."""
    config = model.config
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 2.0 * length**2 * config.hidden_size * config.num_hidden_layers + 2.0 * length * linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32 * K, 128 * K, 512 * K])
    parser.add_argument("--scaled", type=int, nargs="+", default=[1024 * K, 2048 * K], help="two layers at these")
    parser.add_argument("--refine", type=int, default=128 * K, help="length of the refinement step")
    parser.add_argument("--chunk", type=int, default=16 * K)
    parser.add_argument("--hidden-on-host", action="store_true")
    parser.add_argument("--whole", action="store_true", help="all layers at every length: an hour")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device, shape = torch.device(args.device), TINY if args.tiny else SHAPE
    if device.type == "cpu" and not args.tiny:
        raise SystemExit("No CUDA device was found; --tiny tries the script without one.")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rate = matrix_rate(device, 256 if args.tiny else 8192)
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.2f} TFLOP/s in bfloat16", flush=True)
    rows: list[dict[str, Any]] = []

    def note(what: str, length: int, found: tuple[float, float] | None, flops: float, scale: float = 1.0) -> None:
        row: dict[str, Any] = {"what": what, "length": length, "scaled": scale != 1.0}
        if found is not None:
            seconds = found[0] * scale
            row |= {"seconds": seconds, "tokens_a_second": length / seconds, "peak_gib": found[1]}
            row["share_of_rate"] = flops / seconds / rate if flops else None
        rows.append(row)
        print(json.dumps(row), flush=True)

    def tokens(length: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.random.default_rng(0).integers(2, shape["vocab_size"], length).astype(np.uint32)

    attention.register()
    model = build(shape, device, attention.NAME)
    loaded = ours(model, args.chunk, args.hidden_on_host)
    factors = yarn(loaded.spec, 16.0)
    negative_log_likelihood(loaded, tokens(min(args.lengths)), factors)  # kernels are chosen and compiled
    whole = [*args.lengths, *(args.scaled if args.whole else [])]
    for length in whole:
        ids = tokens(length)
        repeats = 3 if length <= 128 * K else 1
        found = measured(partial(negative_log_likelihood, loaded, ids, factors), device, repeats)
        note("evaluator", length, found, work(model, length))
    found = measured(partial(loss_and_gradient, loaded, tokens(args.refine), factors), device, 1)
    note("refinement step", args.refine, found, 0.0)
    del loaded, model
    layers = shape["num_hidden_layers"]
    model = build(shape, device, "sdpa")
    for length in args.lengths:
        ids = torch.as_tensor(tokens(length).astype(np.int64), device=device)[None]
        note("transformers", length, measured(partial(forward, model, ids), device, 1), work(model, length))
    del model
    if not args.whole:
        model = build({**shape, "num_hidden_layers": FEW}, device, attention.NAME)
        loaded = ours(model, args.chunk, args.hidden_on_host)
        for length in args.scaled:
            ids = torch.as_tensor(tokens(length).astype(np.int64), device=device)[None]
            # The layers alone: the head, a few tens of seconds at most, is not scaled up with them, nor counted.
            found = measured(partial(engine.hidden_states, loaded, ids, factors), device, 1)
            share = work(model, length) - 2.0 * length * model.lm_head.weight.numel()
            note(f"{FEW} of {layers} layers", length, found, share * layers / FEW, layers / FEW)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"device": name, "torch": torch.__version__, "matrix_tflops": rate / 1e12, "chunk": args.chunk}
    (args.out / "gpu_evaluator.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    (args.out / "gpu_evaluator.md").write_text(table(facts, rows))
    print(table(facts, rows))


def table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{facts['device']}, torch {facts['torch']}, {facts['matrix_tflops']:.1f} TFLOP/s measured in bfloat16, "
        f"chunks of {facts['chunk']} tokens.",
        "",
        "| what | tokens | seconds | tokens a second | share of the matrix rate | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "seconds" not in row:
            lines.append(f"| {row['what']} | {row['length']:,} | does not fit | | | |")
            continue
        label = f"{row['seconds']:.1f}" + (" (scaled to all layers)" if row["scaled"] else "")
        share = f"{row['share_of_rate']:.0%}" if row["share_of_rate"] else ""
        lines.append(
            f"| {row['what']} | {row['length']:,} | {label} | {row['tokens_a_second']:,.0f} | {share} "
            f"| {row['peak_gib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
