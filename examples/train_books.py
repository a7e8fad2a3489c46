"""Train the books model of the benchmarks: a second architecture, on prose instead of code.

    python examples/train_books.py --books BOOKS --out books_model

A Qwen3 (norms on queries and keys) with a window of 256 tokens, trained on the books in ``BOOKS/train.tar.xz``, one
plain UTF-8 text file a book. ``BOOKS/search`` and ``BOOKS/test`` are never trained on. Prints what it did as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from train_reference import (
    SHAPE,
    WINDOW,
    byte_level_bpe,
    code_rows,
    encode,
    perplexity_inside,
    save,
    train,
)
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def read_books(archive: Path) -> list[tuple[str, str]]:
    """Name and text of every book, by name; read from the archive, nothing is unpacked to disk."""
    books = []
    with tarfile.open(archive) as tar:
        for member in tar:
            handle = tar.extractfile(member) if member.name.endswith(".txt") else None
            if handle is not None:
                books.append((member.name, handle.read().decode("utf-8", errors="ignore")))
    return sorted(books)


def encode_books(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All books as one stream, EOS after each."""
    fast: Tokenizer = tokenizer.backend_tokenizer
    stream = []
    for text in texts:
        # Pieces: a book of megabytes as one pre-tokenised list needs gigabytes.
        pieces = [text[start : start + 2**16] for start in range(0, len(text), 2**16)]
        ids = [e.ids for e in fast.encode_batch_fast(pieces, add_special_tokens=False)]
        stream.append(np.concatenate([*map(np.asarray, ids), [tokenizer.eos_token_id]]).astype(np.uint16))
    return np.concatenate(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder with train.tar.xz")
    parser.add_argument("--out", type=Path, default=Path("books_model"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=32, help="rows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler, a third faster")
    args = parser.parse_args()
    torch.manual_seed(0)

    books = read_books(args.books / "train.tar.xz")
    texts = [text for _, text in books]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    tokenizer = byte_level_bpe([text[:50_000] for text in texts], vocabulary=2048)
    unseen_books, texts = texts[-4:], texts[:-4]  # four books to watch the training by
    stream = encode_books(tokenizer, texts)
    print(f"{len(texts)} books, {sum(map(len, texts)):,} characters, {len(stream):,} tokens", flush=True)

    config = Qwen3Config(
        vocab_size=2048,
        **SHAPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    rows = code_rows(stream, tokenizer.bos_token_id, seed=3)
    unseen = np.concatenate([encode(tokenizer, text[20_000:60_000])[: 12 * 255] for text in unseen_books])
    checks = torch.tensor([[tokenizer.bos_token_id, *row] for row in unseen.reshape(-1, 255)])

    start = time.time()
    train(
        model,
        lambda _: [next(rows) for _ in range(args.batch)],
        args.steps,
        args.rate,
        lambda: {"unseen_perplexity": round(perplexity_inside(model, checks), 3)},
        args.compile,
    )
    save(model, tokenizer, args.out)
    card = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "books": len(texts),
        "corpus_sha256": digest,
        "corpus_tokens": len(stream),
        "tokens_trained": args.steps * args.batch * WINDOW,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round((time.time() - start) / 60, 1),
        "perplexity_inside_window_unseen": round(perplexity_inside(model.float(), checks), 3),
    }
    (args.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
