"""What another trainer made: whether a folder can be the tuned model that a stage waits for."""

from __future__ import annotations

from pathlib import Path

from searcher.errors import LongRopeError
from workers.model import load_tokenizer, resolve_folder

# Of a config: what neither weights, nor rotation, nor tokens depend on.
REMARKS = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id"),
    *("attention_dropout", "_attn_implementation", "_attn_implementation_autoset", "pad_token_id", "initializer_range"),
}


def check_tuned(folder: Path, base: Path, trust_remote_code: bool = False) -> None:
    """That a folder can be the result of a stage that was tuned elsewhere.

    Raises
    ------
    LongRopeError
        Its architecture, rotary geometry, vocabulary or tensors are not the base model's, or it carries a RoPE scaling;
        with what to do.
    """
    from transformers import AutoConfig

    resolve_folder(str(folder), trust_remote_code)
    ours, theirs = (
        AutoConfig.from_pretrained(each, trust_remote_code=trust_remote_code).to_dict() for each in (base, folder)
    )
    for name in sorted({*ours, *theirs} - REMARKS):
        if ours.get(name) != theirs.get(name):
            raise LongRopeError(
                f"The config of {folder} has {name} = {theirs.get(name)!r}, the base model's {ours.get(name)!r}; a "
                "tuned model keeps the architecture and the RoPE of its base, since rescale factors are absolute. If "
                f"its weights are of the same architecture, copy {base / 'config.json'} over its own."
            )
    shapes, found = tensor_shapes(base), tensor_shapes(folder)
    for name in sorted({*shapes, *found}):
        if shapes.get(name) != found.get(name):
            raise LongRopeError(
                f"The tensor {name} is {found.get(name, 'missing')} in {folder} and {shapes.get(name, 'missing')} in "
                "the base model; merge adapters into the model, and save it whole with save_pretrained."
            )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise LongRopeError(f"{folder} has no tokenizer; copy the tokenizer files of {base} into it.")
    tokenizers = [load_tokenizer(each, trust_remote_code) for each in (base, folder)]
    first, second = ((each.get_vocab(), each.bos_token_id, each.eos_token_id) for each in tokenizers)
    if first != second:
        raise LongRopeError(
            f"The tokenizer of {folder} is not the base model's; lengths and scores would not compare. Copy the "
            f"tokenizer files of {base} over its own."
        )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files, read from their headers."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise LongRopeError(f"{path} cannot be read as safetensors, it may be cut off: {error}.") from error
    return shapes
