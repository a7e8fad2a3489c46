"""``longrope export`` in other programs' forms, and ``longrope import`` on the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from searcher.rope import Factors, attention_factor
from storage.factor_file import FactorFile, ModelIdentity, Regime, read, write
from workers.apply import apply_factors
from workers.model import model_digest
from workers.reference import MODEL_DIR

if TYPE_CHECKING:
    from conftest import Longrope

ORIGINAL, TARGET = 256, 2048
REFERENCE = ModelIdentity("reference", model_digest(MODEL_DIR), "llama", 10000.0, 64, ORIGINAL, 4, "half-split")
SU = attention_factor("su", REFERENCE.spec, TARGET / ORIGINAL)
LONG = Factors(tuple(round(1 + 7 * (pair / 31) ** 1.7, 2) for pair in range(32)), 0, SU)
SHORT = Factors(tuple(round(1 + 0.4 * pair / 31, 2) for pair in range(32)), 0, SU)
PROVENANCE = {"study": None, "seed": None, "data": {}, "software": {}}


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    """A factor file of the reference model with a regime within the window and one beyond."""
    path = tmp_path / "two-factors.json"
    regimes = (Regime(1, ORIGINAL, SHORT, repr(SU)), Regime(ORIGINAL + 1, TARGET, LONG, "su"))
    write(path, FactorFile(REFERENCE, regimes, PROVENANCE))
    return path


def log_probabilities(server: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 1024, "temperature": 0, "cache_prompt": False}
    (token,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    found = np.full(1024, np.nan)
    for candidate in token["top_logprobs"]:
        found[candidate["id"]] = candidate["logprob"]
    return found


def test_llama_cpp_predicts_what_we_do(longrope: Longrope, factors: Path, tmp_path: Path) -> None:
    """Short and long, by the context that it is given; from the converted model, then from a patched file."""
    xllamacpp = pytest.importorskip("xllamacpp")
    export = ("export", str(factors), "--to=gguf")
    assert longrope(*export, f"--model={MODEL_DIR}", "--out=converted.gguf").status == 0
    assert longrope(*export, "--gguf=converted.gguf", "--out=patched.gguf").status == 0
    again = longrope("import", "patched.gguf", "--json")
    assert json.loads(again.out)["regimes"] == 2, again.err
    back = read(tmp_path / "patched-factors.json")
    assert [regime.factors for regime in back.regimes] == [SHORT, LONG]
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(2, 1024, 600).tolist()
    applied = apply_factors(model, str(factors))
    for context, length in ((ORIGINAL, 200), (TARGET, 600)):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(tmp_path / "patched.gguf")
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.n_gpu_layers = context, 1, False, 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        theirs = log_probabilities(xllamacpp.Server(settings), ids[:length])
        with torch.inference_mode():
            ours = torch.log_softmax(model(torch.tensor([ids[:length]])).logits[0, -1].double(), -1).numpy()
        np.testing.assert_allclose(theirs, ours, atol=5e-3, rtol=0)
    applied.remove()
    with torch.inference_mode():
        untouched = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
    assert np.abs(untouched - theirs).max() > 0.1  # else the factors would not matter


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_a_server_gets_an_override_and_its_command(
    longrope: Longrope, factors: Path, tmp_path: Path, form: str
) -> None:
    ended = longrope("export", str(factors), f"--to={form}", f"--model={MODEL_DIR}", "--out=o.json", "--json")
    answer = json.loads(ended.out)
    assert str(MODEL_DIR) in answer["command"]
    assert f" {TARGET}" in answer["command"]
    assert '"$(cat o.json)"' in answer["command"]
    rope = json.loads((tmp_path / "o.json").read_text())["rope_parameters"]
    assert (rope["short_factor"], rope["long_factor"]) == ([*SHORT.lambdas], [*LONG.lambdas])
    assert (rope["rope_theta"], rope["original_max_position_embeddings"]) == (10000.0, ORIGINAL)
    assert (rope["short_mscale"], rope["long_mscale"]) == (SU, SU)


def test_csv_back_with_what_it_lacks(longrope: Longrope, factors: Path, tmp_path: Path) -> None:
    export = longrope("export", str(factors), "--to=csv", "--by-layer", "--out=f.csv", "--accept-loss=regimes")
    assert export.status == 0, export.err
    bare = longrope("import", "f.csv")
    assert bare.err == (
        "Error: The file does not say theta, original length and target length; give --theta, --original-length, "
        "--target, or the model with --model.\n"
    )
    ended = longrope("import", "f.csv", f"--model={MODEL_DIR}", "--target=8x", "--n-hat=4", "--json")
    assert ended.status == 0, ended.err
    file = read(tmp_path / "f-factors.json")
    (regime,) = file.regimes
    assert regime.factors == Factors((LONG.lambdas,) * 4, 4, SU)  # type: ignore[arg-type]
    assert (regime.max_length, regime.attention_policy) == (TARGET, "su")
    assert (file.model.weights_sha256, file.model.pairing) == (REFERENCE.weights_sha256, "half-split")
    assert "attention factor" in json.loads(ended.out)["notes"][0]
    wrong = longrope("import", "f.csv", f"--model={MODEL_DIR}", "--target=8x", "--layers=5")
    assert "The file has layers 4, but 5 is given" in wrong.err
    far = longrope("import", "f.csv", f"--model={MODEL_DIR}", "--target=8x", "--n-hat=2049", "--out=far.json")
    assert "n_hat counts start tokens of the target's 2048, so it cannot be 2049" in far.err
    assert not (tmp_path / "far.json").exists()
    (tmp_path / "f.csv").rename(tmp_path / "plain")  # known by how it begins
    assert longrope("import", "plain", f"--model={MODEL_DIR}", "--target=8x", "--out=same.json").status == 0
    assert read(tmp_path / "same.json").regimes[0].factors.lambdas == regime.factors.lambdas


def test_a_config_patch_back(longrope: Longrope, factors: Path, tmp_path: Path) -> None:
    export = ("export", str(factors), f"--model={MODEL_DIR}")
    for form in ("transformers-config", "transformers4-config", "vllm", "sglang"):
        assert longrope(*export, f"--to={form}", "--out=p.json", "--overwrite").status == 0
        ended = longrope("import", "p.json", f"--model={MODEL_DIR}", f"--out={form}.json")
        assert ended.status == 0, ended.err
        assert [regime.factors for regime in read(tmp_path / f"{form}.json").regimes] == [SHORT, LONG]


def test_what_is_there_stays_unless_it_is_the_same_or_may_go(longrope: Longrope, factors: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_bytes(factors.read_bytes())
    assert longrope("export", str(factors), "--out=mine.json").status == 0  # nothing to be lost
    mine.write_text("{}")
    for command in (("export", str(factors)), ("import", "p.json", f"--model={MODEL_DIR}")):
        longrope("export", str(factors), f"--model={MODEL_DIR}", "--to=vllm", "--out=p.json")
        refused = longrope(*command, "--out=mine.json")
        assert (refused.status, mine.read_text()) == (1, "{}")
        assert "mine.json is there already" in refused.err
        assert longrope(*command, "--out=mine.json", "--overwrite").status == 0
        assert read(mine).regimes
        mine.write_text("{}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to=csv",), "CSV cannot hold more than 1 of the regimes here (those up to 256 tokens are too many)."),
        (("--to=csv", "--accept-loss=all"), "--accept-loss is n_hat, layers, regimes, attention_factor or short_"),
        (("--to=vllm", "--short=none"), "--short is file, long or untouched, not 'none'"),
        (("--to=vllm-config",), "--to is json, csv, gguf"),
        (("--to=vllm",), "name its folder with --model"),
        (("--to=onnx-genai", f"--model={MODEL_DIR}"), "is not known to apply LongRoPE in llama models, only in phi3"),
        (("--to=gguf", "--gguf=two-factors.json"), "two-factors.json is not a valid GGUF file: it does not begin"),
        (("--to=gguf", "--gguf=none.gguf"), "none.gguf cannot be read: No such file"),
        (("--to=csv", "--accept-loss=regimes", "--out=no/x.csv"), "no/x.csv cannot be written"),
        (("--to=transformers", "--length=4096", f"--model={MODEL_DIR}"), "No regime serves 4096 tokens"),
    ],
)
def test_refusals(longrope: Longrope, factors: Path, arguments: tuple[str, ...], message: str) -> None:
    ended = longrope("export", str(factors), *arguments)
    assert ended.status == 1
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
