"""Models, lengths and text that no search can work with."""

from __future__ import annotations

from tests.bad_input.bad import LAUNCH, READ, Bad, config, usage

MODELS = {
    "no such folder": Bad(f"{LAUNCH} --model nowhere", "There is no model folder nowhere; give a folder"),
    "an empty model name": Bad(f"{LAUNCH} --model ''", "holds no config.json"),
    "a hub name that is not there": Bad(f"{LAUNCH} --model no-such-organisation/no-such-model", "Hugging Face hub"),
    "a file for a folder": Bad(f"{LAUNCH} --model {{text}}/0.txt", "There is no model folder"),
    "no config": Bad(f"{LAUNCH} --model {{world}}/no-config", "holds no config.json"),
    "no safetensors": Bad(f"{LAUNCH} --model {{world}}/pickled", "{world}/pickled holds no .safetensors file"),
    "a config that is no JSON": Bad(
        f"{LAUNCH} --model {{world}}/broken-config", "config.json cannot be read as JSON: Expecting property name"
    ),
    "a config that is a list": Bad(
        f"{LAUNCH} --model {{world}}/list-config", "config.json must hold a JSON object, not a list"
    ),
    "a family that nobody knows": Bad(f"{LAUNCH} --model {{world}}/unknown-family", "model type `nonsense`"),
    "no tokenizer": Bad(f"{LAUNCH} --model {{world}}/no-tokenizer", "No tokenizer could be loaded from"),
    "weights cut off": Bad(
        f"{LAUNCH} --model {{world}}/cut-off", "model.safetensors cannot be loaded as safetensors weights"
    ),
    "NaN in the weights": Bad(
        f"{LAUNCH} --model {{world}}/nan", "up_proj.weight of {world}/nan holds values that are not"
    ),
    "a tensor missing": Bad(
        f"{LAUNCH} --model {{world}}/incomplete", "lacks 1 tensors of its architecture (model.layers.1"
    ),
    "weights of another size": Bad(
        f"{LAUNCH} --model {{world}}/other-size", "has shape (258, 64), but its config.json"
    ),
    "tokenizer of another model": Bad(f"{LAUNCH} --model {{world}}/small-vocabulary", "the model embeds only 60"),
    "GPT-2, no rotary embedding": Bad(f"{LAUNCH} --model {{world}}/gpt2", "has no rotary position embedding"),
    "code not allowed": Bad(f"{LAUNCH} --model {{world}}/own-code", "allow it with --trust-remote-code"),
    "header longer than the file": Bad(f"{LAUNCH} --model {{world}}/long-header", "as safetensors weights"),
    "header of a tensor of terabytes": Bad(f"{LAUNCH} --model {{world}}/vast-tensor", "as safetensors weights"),
    "header, nested without end": Bad(f"{LAUNCH} --model {{world}}/deep-header", "as safetensors weights"),
    "attention window below the target": Bad(
        f"{LAUNCH} --model {{world}}/windowed", "attends to a window of 128 tokens, shorter than the target of 256"
    ),
    "model without data": Bad("launch --model {model}", "Name text for your model with --data"),
    "evaluate without data": Bad("evaluate --model {model}", "Name text for your model with --data"),
    "evaluate, broken weights": Bad(
        "evaluate --in-process --model {world}/nan --data {text} --lengths 1x", "holds values that are not finite"
    ),
}

SCALED = {"rope_type": "longrope", "rope_theta": 500.0, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}

CONFIGS = {
    "config, empty": config(" ", "odd/config.json cannot be read as JSON: Expecting value"),
    "config, nested without end": config("[" * 100_000, "odd/config.json cannot be read as JSON: maximum recursion"),
    "config, a number of 5,000 digits": config(f'{{"hidden_size": {"9" * 5000}}}', "cannot be read as JSON: Exceeds"),
    "config, a size in words": config({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
    "config, an infinite size": config({"hidden_size": float("inf")}, "Field 'hidden_size' expected int, got float"),
    "config, no size": config({"hidden_size": 0}, "but its config.json makes it (258, 0)"),
    "config, negative size": config({"hidden_size": -64}, "odd cannot be loaded as a causal language model: Trying to"),
    "config, a width of terabytes": config({"hidden_size": 10**6}, "but its config.json makes it (258, 1000000)"),
    "config, a width beyond all": config({"hidden_size": 10**15}, "its config.json makes it (258, 1000000000000000)"),
    "config, words without end": config({"vocab_size": 10**12}, "but its config.json makes it (1000000000000, 64)"),
    "config, layers without end": config({"num_hidden_layers": 10**9}, "makes 1000000000 layers, but the weights hold"),
    "config, no layers": config({"num_hidden_layers": 0}, "makes 0 layers, but the weights hold"),
    "config, no heads": config({"num_attention_heads": 0}, "odd cannot be used: integer modulo by zero"),
    "config, heads that do not divide": config(
        {"num_attention_heads": 7}, "is not a multiple of the number of attention"
    ),
    "config, heads of no width": config({"head_dim": 0}, "odd cannot be loaded as a causal language model"),
    "config, no window": config({"max_position_embeddings": 0}, "give the trained length with --original-length"),
    "config, negative window": config({"max_position_embeddings": -64}, "should be a number of tokens, not -64"),
    "config, the target's window": config({"max_position_embeddings": 2**40}, "at most 2048M"),
    "config, no base": config({"rope_parameters.rope_theta": 0}, "has rope_theta 0; a base is a number above 1"),
    "config, base in words": config({"rope_parameters.rope_theta": "high"}, "rope_theta 'high'; a base is a number"),
    "config, unknown scaling": config(
        {"rope_parameters.rope_type": "nonsense"}, "scales RoPE by 'nonsense'; transformers"
    ),
    "config, too few of its own factors": config(
        {"rope_parameters": {**SCALED, "long_factor": [2.0] * 7, "original_max_position_embeddings": 32}},
        "cannot be run as its config describes it: The size of tensor a (7)",
    ),
    "config, own factors that are words": config(
        {"rope_parameters": {**SCALED, "long_factor": "abc", "original_max_position_embeddings": 32}},
        "cannot be run as its config describes it",
    ),
    "config, own factors that are NaN": config(
        {"rope_parameters": {**SCALED, "long_factor": [float("nan")] * 8, "original_max_position_embeddings": 32}},
        "The model's own RoPE scaling, longrope, cannot be used: Rescale factors must be finite",
    ),
    "config, original length in words": config(
        {"rope_parameters": {**SCALED, "original_max_position_embeddings": "x"}},
        "The config's trained length should be a number of tokens, not 'x'",
    ),
}

LENGTHS = {
    "target below the window": Bad(
        f"{LAUNCH} --target 32", "The target of 32 tokens is not above the trained window of 64"
    ),
    "target at the window": Bad(f"{LAUNCH} --target 1x", "give a longer --target"),
    "target that is no whole number": Bad(
        f"{LAUNCH} --target 4.1x", "A length is a whole number of tokens such as 2048"
    ),
    "infinite target": Bad(f"{LAUNCH} --target inf", "A length is a whole number of tokens"),
    "target in words": Bad(f"{LAUNCH} --target long", "not 'long'"),
    "empty target": Bad(f"{LAUNCH} --target ''", "A length is a whole number"),
    "negative target": Bad(f"{LAUNCH} --target=-4x", "A length is a whole number"),
    "lengths with a gap": Bad("evaluate --model {model} --data {text} --lengths 1x,,2x", "A length is a whole number"),
    "lengths beyond the text": Bad(
        "evaluate --model {model} --data {text} --lengths 16x", "documents of at least 1024 tokens"
    ),
    "original length": usage(f"{LAUNCH} --original-length 1", "--original-length"),
}

TEXT = {
    "no such text": Bad(f"{READ} --data nowhere.txt", "There is no file or folder nowhere.txt"),
    "a glob without a match": Bad(f"{READ} --data '{{text}}/*.md'", "No file matches"),
    "documents too short": Bad(
        f"{LAUNCH} --target 16x", "5 documents of at least 1024 tokens are needed (search 2, selection 1"
    ),
    "too few documents": Bad(f"{LAUNCH} --test-documents 20", "but of 9 documents 9 are that long"),
    "text without a name": Bad(f"{READ} --data ''", "--data should name text, but one of the names is empty"),
    "empty text": Bad(f"{READ} --data {{world}}/empty.txt", "--data should name text, but there is none in"),
    "a folder without text": Bad(f"{READ} --data {{world}}/no-text", "should hold text, but no file in it ends in"),
    "binary text": Bad(f"{READ} --data {{world}}/binary.txt", "should be UTF-8 text but is not"),
    "JSONL without the column": Bad(f"{READ} --data {{world}}/rows.jsonl", "should have a column text but has body"),
    "JSONL with numbers": Bad(f"{READ} --data {{world}}/rows.jsonl --text-column id", "holds a int; name the column"),
    "JSONL that is none": Bad(f"{READ} --data {{world}}/broken.jsonl", "broken.jsonl:2 should be a JSON object"),
    "gzip cut off": Bad(f"{READ} --data {{world}}/cut-off.jsonl.gz", "cannot be read (Compressed file ended"),
    "JSONL, nested without end": Bad(f"{READ} --data {{world}}/deep.jsonl", "deep.jsonl:1 should be a JSON object but"),
    "JSONL of lists": Bad(
        f"{READ} --data {{world}}/lists.jsonl", "lists.jsonl:1 should be a JSON object but is a list"
    ),
    "JSONL with half a character": Bad(f"{READ} --data {{world}}/half.jsonl", "half.jsonl:1 should be Unicode text"),
    "gzip that is none": Bad(f"{READ} --data {{world}}/none.jsonl.gz", "cannot be read (Not a gzipped file"),
    "parquet of numbers": Bad(
        f"{READ} --data {{world}}/numbers.parquet", "should hold text in its column text but holds a int64; name"
    ),
    "parquet without the column": Bad(
        f"{READ} --data {{world}}/numbers.parquet --text-column body", "should have a column body but has text"
    ),
    "parquet cut off": Bad(f"{READ} --data {{world}}/cut-off.parquet", "cut-off.parquet cannot be read ("),
    "a device for text": Bad(f"{READ} --data /dev/zero", "/dev/zero is a device or a pipe; name files that can be"),
    "the home of nobody": Bad(f"{READ} --data ~nobody-of-this-name/text", "~nobody-of-this-name"),
    "a name that no file can have": Bad(f"{READ} --data {'a' * 5000}", "cannot be looked at ("),
    "parquet that is none": Bad(f"{READ} --data {{world}}/broken.parquet", "should be a parquet file"),
    "one document in two sets": Bad(
        f"{LAUNCH} --selection-data {{text}}/1.txt --test-data {{text}}/2.txt",
        "the text of 1.txt is in both search and",
    ),
    "two documents that begin alike": Bad(f"{READ} --data {{world}}/alike", "No two windows may be the same"),
    "a test set alone": Bad(f"{LAUNCH} --test-data {{text}}/2.txt", "Name both --selection-data and --test-data"),
    "sets without a search set": Bad(
        "launch --in-process --selection-data {text}/1.txt --test-data {text}/2.txt",
        "Name the search documents with --data",
    ),
}
