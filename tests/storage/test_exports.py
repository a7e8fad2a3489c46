"""Exports, checked in the consumer itself: transformers loads what was written and rotates as the formula says."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from searcher.errors import LongRopeError
from searcher.rope import Factors, angles
from storage.config_forms import config_patch, form_room
from storage.factor_file import FactorFile, ModelIdentity, Regime, RegimeScore, WithoutNHat
from storage.losses import N_HAT, Taken, take
from storage.model_config import FAMILIES, LAYER_TYPE
from storage.model_folder import read_config, write_model_folder
from tests.limits import files_no_larger_than

ORIGINAL, TARGET = 16, 64
ATTENTION = 1.2345
# What a family needs beyond the common shape, so that heads are small and all tokens are ordinary ones.
EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "phi3": {"pad_token_id": 0, "original_max_position_embeddings": ORIGINAL},
    "qwen3": {"head_dim": 16},
}


def identity(family: str, rotary_dim: int = 16, theta: float = 10000.0) -> ModelIdentity:
    return ModelIdentity(family, "0" * 64, family, theta, rotary_dim, ORIGINAL, 2, "half-split")


def lambdas(pairs: int) -> tuple[float, ...]:
    return tuple(1.0 + 3.37 * (i / (pairs - 1)) ** 2 for i in range(pairs))


def factor_file(model: ModelIdentity, factors: Factors | None = None, **regime: Any) -> FactorFile:
    factors = factors or Factors(lambdas(model.rotary_dim // 2), attention_factor=ATTENTION)
    return FactorFile(model, (Regime(1, TARGET, factors, "su", **regime),), {})


def transformers_patch(
    model: ModelIdentity, factors: Factors, target: int, config: dict[str, Any], window: int | None = None
) -> dict[str, object]:
    file = FactorFile(model, (Regime(1, target, factors, "su"),), {})
    return config_patch("transformers", take(file, form_room("transformers", model.family)), config, window)


def transformers_folder(file: FactorFile, base: Path, out: Path, form: str = "transformers") -> Taken:
    taken = take(file, form_room(form, file.model.family))
    write_model_folder(base, out, config_patch(form, taken, read_config(base)), taken.target_length)
    return taken


def build(family: str, folder: Path, **extra: Any) -> Path:
    """A tiny random model whose attention matters, saved."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": ORIGINAL,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = CONFIG_MAPPING[family](**(shape | EXTRA.get(family, {}) | extra))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@contextmanager
def transformers_warnings() -> Iterator[list[str]]:
    """What transformers says meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logging.getLogger("transformers").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        transformers_logging.set_verbosity(before)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Formula(torch.nn.Module):
    """The rotation as searcher.rope states it, in the place of a model's own."""

    def __init__(self, model: ModelIdentity, factors: Factors) -> None:
        super().__init__()
        self.model, self.factors = model, factors

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = angles(self.model.spec, self.factors, position_ids[0].numpy())
        both = torch.from_numpy(np.concatenate([turned, turned], axis=-1))[None]
        scale = self.factors.attention_factor
        return (both.cos() * scale).to(x.dtype), (both.sin() * scale).to(x.dtype)


def check(base: Path, out: Path, model: ModelIdentity, factors: Factors) -> None:
    """transformers reads every key of the exported config, and rotates and predicts as the formula does."""
    written = json.loads((out / "config.json").read_text())
    with transformers_warnings() as said:
        exported = load(out)
    assert said == []
    read = exported.config.rope_parameters
    assert {key: read.get(key) for key in written["rope_parameters"]} == written["rope_parameters"]
    assert exported.config.max_position_embeddings == TARGET
    reference = load(base)
    untouched = reference.model.rotary_emb
    formula = Formula(model, factors)
    tokens = torch.randint(3, 60, (2, TARGET), generator=torch.Generator().manual_seed(1))
    # Below, at and beyond the original length, and back again: nothing may depend on what came before.
    for length in (ORIGINAL // 2, ORIGINAL, ORIGINAL + 1, TARGET, ORIGINAL // 2):
        positions = torch.arange(length)[None]
        for ours, theirs in zip(
            formula(torch.zeros(1), positions), exported.model.rotary_emb(torch.zeros(1), positions), strict=True
        ):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)
        with torch.inference_mode():
            theirs = exported(tokens[:, :length]).logits
            reference.model.rotary_emb = formula
            torch.testing.assert_close(theirs, reference(tokens[:, :length]).logits, atol=2e-3, rtol=1e-3)
            reference.model.rotary_emb = untouched
            # The comparison means something only if the factors change what the model predicts.
            assert float((theirs - reference(tokens[:, :length]).logits).abs().max()) > 0.05


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*LAYER_TYPE}))
def test_transformers_rotates_as_the_formula_says(tmp_path: Path, family: str) -> None:
    base = build(family, tmp_path / "base")
    model = identity(family, int(16 * (FAMILIES[family] or 1.0)))
    file = factor_file(model)
    export = transformers_folder(file, base, tmp_path / "out")
    assert export.long == file.regimes[0].factors
    check(base, tmp_path / "out", model, export.long)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
OLDER = {"rope_parameters": None, "rope_theta": 10000.0}  # the spelling before transformers 5
LINEAR = {"type": "linear", "factor": 2.0}
PHI3 = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
AWKWARD: dict[str, tuple[str, int, dict[str, Any]]] = {
    # A scaling of the model's own would win over what is written, or mix with it.
    "older llama3": ("llama", 16, {**OLDER, "rope_scaling": LLAMA3}),
    "older linear": ("llama", 16, {**OLDER, "rope_scaling": LINEAR}),
    "both spellings": ("llama", 16, {**OLDER, "rope_parameters": {"rope_theta": 7.0}, "rope_scaling": LINEAR}),
    "llama3": ("llama", 16, {"rope_parameters": {**LLAMA3, "rope_theta": 10000.0}}),
    "phi3 longrope": ("phi3", 16, {**OLDER, "rope_scaling": PHI3}),
    # At the top level the original length wins, in every family.
    "original length": ("llama", 16, {"original_max_position_embeddings": 8}),
    # Read by LongRoPE, but not by the unscaled RoPE of a family that rotates whole heads.
    "stray fraction": ("llama", 16, {"partial_rotary_factor": 0.5}),
    # LongRoPE in transformers takes null as it stands.
    "null head_dim": ("mixtral", 16, {"head_dim": None}),
    "filled head_dim": ("llama", 16, {"head_dim": None}),
    # The family's own fraction where the config states none, and one that is stated.
    "unstated fraction": ("phi", 8, OLDER),
    "older fraction": ("phi3", 12, {**OLDER, "partial_rotary_factor": 0.75}),
    "nested fraction": ("stablelm", 8, {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
}


@pytest.mark.parametrize(("family", "rotary_dim", "change"), AWKWARD.values(), ids=AWKWARD)
def test_awkward_configs(tmp_path: Path, family: str, rotary_dim: int, change: dict[str, Any]) -> None:
    base = build(family, tmp_path / "base")
    path = base / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "rope_parameters" or value}))
    file = factor_file(identity(family, rotary_dim))
    export = transformers_folder(file, base, tmp_path / "out")
    check(base, tmp_path / "out", file.model, export.long)


def test_generation_across_the_original_length_keeps_its_cache(tmp_path: Path, llama: Path) -> None:
    """The lists are equal, so keys that were cached below the original length stay right beyond it."""
    file = factor_file(identity("llama"))
    transformers_folder(file, llama, tmp_path / "out")
    model = load(tmp_path / "out")
    prompt = torch.randint(3, 60, (1, ORIGINAL - 3), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        cached, cache = [], None
        for token in prompt.split(1, dim=1) + tuple(torch.full((1, 1), 7 + i) for i in range(8)):
            step = model(token, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            cached.append(step.logits)
        whole = model(torch.cat([prompt, torch.arange(7, 15)[None]], dim=1)).logits
    torch.testing.assert_close(torch.cat(cached, dim=1), whole, atol=1e-3, rtol=1e-3)


def test_another_process_needs_no_code_of_ours(tmp_path: Path, llama: Path) -> None:
    file = factor_file(identity("llama"))
    out = tmp_path / "out"
    transformers_folder(file, llama, out)
    script = """
import sys
import numpy, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.inference_mode():
    numpy.save(sys.argv[2], model(torch.arange(3, 51)[None]).logits.numpy())
assert not {"searcher", "storage", "workers", "commands", "cli"} & set(sys.modules)
"""
    command = [sys.executable, "-I", "-c", script, str(out), str(tmp_path / "logits.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        here = load(out)(torch.arange(3, 51)[None]).logits.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), here, rtol=1e-5, atol=1e-5)


def test_a_family_that_ignores_one_rope_for_all_layers_gets_it_where_it_looks(tmp_path: Path) -> None:
    """gemma3: given one RoPE for all layers, transformers rotates by none; nested, the far-reaching layers by it."""
    flat = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [2.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.5,
    }  # fmt: skip
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    types = ["full_attention", "sliding_attention"]
    shape = {"head_dim": 16, "pad_token_id": 0, "num_hidden_layers": 2, "layer_types": types}
    ignored = CONFIG_MAPPING["gemma3_text"](hidden_size=64, num_attention_heads=4, rope_parameters=flat, **shape)
    assert {value["rope_type"] for value in ignored.rope_parameters.values() if isinstance(value, dict)} == {"default"}
    base = build("gemma3_text", tmp_path / "base", rope_parameters=nested, **shape)
    file = factor_file(identity("gemma3_text"))
    transformers_folder(file, base, tmp_path / "out")
    with transformers_warnings() as said:
        rotary = load(tmp_path / "out").model.rotary_emb
    assert said == []
    factors, positions = file.regimes[0].factors, torch.arange(TARGET)[None]
    near = replace(identity("gemma3_text"), theta=500.0)
    for layer_type, model, under in (
        ("full_attention", file.model, factors),
        ("sliding_attention", near, Factors((1.0,) * 8)),
    ):
        ours = Formula(model, under)(torch.zeros(1), positions)
        theirs = rotary(torch.zeros(1), positions, layer_type)
        torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rope_theta": 10000.0,
}


def test_the_patch_replaces_whole_keys() -> None:
    factors = Factors(lambdas(8), attention_factor=ATTENTION)
    config = CONFIG | {"rope_scaling": LLAMA3, "sliding_window": 8}
    patch = transformers_patch(identity("llama"), factors, 40, config, 2**30)
    assert patch == {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": list(lambdas(8)),
            "long_factor": list(lambdas(8)),
            "original_max_position_embeddings": ORIGINAL,
            "attention_factor": ATTENTION,
            "factor": 2.5,
        },
        "max_position_embeddings": 40,
        "rope_scaling": None,
        "sliding_window": 2**30,
    }


@pytest.mark.parametrize(
    ("model", "factors", "target", "change", "message"),
    [
        (identity("llama"), Factors(lambdas(8)), 15, {}, "the target of 15 tokens is below 16"),
        (identity("llama"), Factors(lambdas(8), n_hat=1), 64, {}, "transformers cannot hold n_hat = 1"),
        (
            identity("llama"),
            Factors((lambdas(8), lambdas(8)[::-1])),
            64,
            {},
            r"cannot hold factors that differ by layer \(2 lists\)",
        ),
        (identity("llama"), Factors(lambdas(4)), 64, {}, "has 8 rotary pairs, the factors are 4"),
        (identity("llama"), Factors((2.0,)), 64, {}, "has 8 rotary pairs, the factors are 1"),
        (identity("falcon"), Factors(lambdas(8)), 64, {}, "is not known to apply LongRoPE in falcon models"),
        (identity("llama"), Factors(lambdas(8)), 64, {"model_type": "qwen2"}, "model_type llama, but .* has qwen2"),
        (identity("llama"), Factors(lambdas(8)), 64, {"num_hidden_layers": 3}, "num_hidden_layers 2, but .* has 3"),
        (identity("llama"), Factors(lambdas(8)), 64, {"rope_theta": 5e5}, "rope_theta 10000.0, but .* has 500000.0"),
        (identity("llama"), Factors(lambdas(8)), 64, {"rope_parameters": {"rope_theta": 7}}, "but config.json has 7;"),
        (identity("llama"), Factors(lambdas(8)), 64, {"head_dim": 32}, "rotary dimension 16, but .* has 32"),
        (identity("llama"), Factors(lambdas(8)), 64, {"hidden_size": None}, "must state hidden_size"),
        (
            identity("phi"),
            Factors(lambdas(8)),
            64,
            {"model_type": "phi", "partial_rotary_factor": "half"},
            "partial_rotary_factor .* must be a number, not 'half'",
        ),
    ],
)
def test_what_transformers_cannot_hold_is_refused(
    model: ModelIdentity, factors: Factors, target: int, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LongRopeError, match=message):
        transformers_patch(model, factors, target, CONFIG | change)


def score(perplexity: float, length: int = TARGET) -> RegimeScore:
    return RegimeScore(perplexity, 5 * (length - 1), 5, length)


def test_n_hat_is_given_up_at_a_stated_price() -> None:
    plain = Factors(lambdas(8), attention_factor=ATTENTION)
    searched = Factors((1.0,) * 8, n_hat=8, attention_factor=ATTENTION)
    alternative = WithoutNHat(plain, {"test": score(11.0), "short": score(8.5, ORIGINAL)})
    scores = {"selection": score(12.0), "test": score(10.0), "short": score(8.0, ORIGINAL)}
    file = FactorFile(identity("llama"), (Regime(1, TARGET, searched, "su", scores, alternative),), {})
    taken = take(file, form_room("transformers", "llama"), {N_HAT})
    assert taken.long == taken.short == plain
    assert taken.notes[0].startswith("n_hat = 8 cannot be held")
    assert "On test that costs perplexity 10.0000 -> 11.0000 (+10.00%)." in taken.notes
    assert taken.notes[-1] == "The same factors serve short text: perplexity 8.5000 at 16 tokens."


def test_without_n_hat_nothing_is_given_up() -> None:
    file = factor_file(identity("llama"), scores={"test": score(10.0)}, without_n_hat=WithoutNHat(Factors((9.0,) * 8)))
    taken = take(file, form_room("transformers", "llama"))
    assert taken.long == file.regimes[0].factors
    assert taken.notes == ("The same factors serve short text; their perplexity there was not measured.",)


def fake_model(folder: Path) -> Path:
    """A folder with the shape of a model: what is only copied needs no content."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "bfloat16"}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def export_to(out: Path, base: Path) -> None:
    file = factor_file(identity("llama"))
    transformers_folder(file, base, out)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_everything_else_is_copied_as_it_is(tmp_path: Path) -> None:
    """As from a hub's cache: links to read-only files, subfolders, hidden remains."""
    base = fake_model(tmp_path / "snapshot")
    blob = (base / "model.safetensors").rename(tmp_path / "blob")
    blob.chmod(0o444)
    (base / "model.safetensors").symlink_to(blob)
    (base / "chat").mkdir()
    (base / "chat" / "template.jinja").write_text("hello")
    (base / "chat" / "config.json").write_text("other")
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").write_text("")
    out = tmp_path / "new" / "out"
    export_to(out, base)
    assert tree(out) == [
        "chat", "chat/config.json", "chat/template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert not (out / "model.safetensors").is_symlink()
    assert (out / "model.safetensors").read_bytes() == blob.read_bytes()
    assert (out / "chat" / "config.json").read_text() == "other"
    written = json.loads((out / "config.json").read_text())
    assert written == CONFIG | {"torch_dtype": "bfloat16"} | transformers_patch(
        identity("llama"), Factors(lambdas(8), attention_factor=ATTENTION), TARGET, CONFIG
    )
    assert list(out.parent.iterdir()) == [out]


def test_an_empty_folder_is_filled_and_any_other_is_left_alone(tmp_path: Path) -> None:
    base = fake_model(tmp_path / "base")
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    full.mkdir()
    (full / "mine").write_text("x")
    file.write_text("x")
    export_to(empty, base)
    assert "config.json" in tree(empty)
    for taken in (full, file):
        with pytest.raises(LongRopeError, match="is there already and is not an empty folder"):
            export_to(taken, base)
    assert tree(full) == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "empty", "file", "full"]


def _break_link(base: Path) -> None:
    (base / "vocab.json").symlink_to(base / "gone")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: (base / "config.json").unlink(), "config.json cannot be read: No such file"),
        (lambda base: (base / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda base: (base / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda base: (base / "model.safetensors").unlink(), "holds no .safetensors file"),
        (_break_link, r"cannot be written: No such file or directory \(.*vocab.json"),
    ],
)
def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    base = fake_model(tmp_path / "base")
    spoil(base)
    with pytest.raises(LongRopeError, match=message):
        export_to(tmp_path / "out", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    base = fake_model(tmp_path / "base")
    with files_no_larger_than(50_000), pytest.raises(LongRopeError, match="cannot be written: File too large"):
        export_to(tmp_path / "out", base)  # the weights fail half-way
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_copy_inside_the_model_itself_is_refused(tmp_path: Path) -> None:
    base = fake_model(tmp_path / "base")
    before = tree(base)
    for out in (base, base / "out", base / "chat" / ".." / "out"):
        with pytest.raises(LongRopeError, match=r"lies in the model folder|is there already"):
            export_to(out, base)
    assert tree(base) == before
