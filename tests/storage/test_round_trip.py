"""Every form out and back: the same factors, or refused with the loss by its name."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from searcher.rope import Factors, attention_factor
from storage.config_forms import FORMS, config_patch, form_notes, form_room
from storage.factor_csv import CSV, from_csv, to_csv
from storage.factor_file import FactorFile, ModelIdentity, Regime, from_json, to_json
from storage.gguf_file import LLAMA_CPP, LONG, patch_gguf, read_gguf
from storage.imports import Stated, complete, imported_file, read_config_form
from storage.losses import (
    ATTENTION,
    DERIVED,
    LAYERS,
    LOSSES,
    N_HAT,
    ONE,
    REGIMES,
    SHORT_ATTENTION,
    UNTOUCHED,
    LossError,
    Room,
    same_number,
    take,
)

PAIRS, LAYER_COUNT, ORIGINAL = 4, 2, 128
MODEL = ModelIdentity("tiny", "0" * 64, "llama", 10000.0, 2 * PAIRS, ORIGINAL, LAYER_COUNT, "half-split")
CONFIG = {
    "model_type": "llama", "num_hidden_layers": LAYER_COUNT, "hidden_size": 16, "num_attention_heads": 2,
    "rope_theta": 10000.0, "max_position_embeddings": ORIGINAL,
}  # fmt: skip

SU = attention_factor("su", MODEL.spec, 8.0)

# On the grid and off it, rising and falling.
LAMBDAS = st.one_of(st.integers(100, 60000).map(lambda value: value / 100), st.floats(0.5, 600.0))
ROW = st.lists(LAMBDAS, min_size=PAIRS, max_size=PAIRS).map(tuple)
LISTS = st.one_of(ROW, st.lists(ROW, min_size=LAYER_COUNT, max_size=LAYER_COUNT).map(tuple))


@st.composite
def regimes(draw: st.DrawFn) -> tuple[Regime, ...]:
    ends = sorted(draw(st.sets(st.sampled_from((64, ORIGINAL, 512, 1024, 4096)), min_size=1, max_size=3)))
    found, first = [], 1
    for end in ends:
        su = attention_factor("su", MODEL.spec, end / ORIGINAL)
        attention = draw(st.one_of(st.just(su), st.just(su), st.floats(0.5, 2.0)))
        n_hat = draw(st.sampled_from((0, 0, 0, 4)))
        found.append(Regime(first, end, Factors(draw(LISTS), n_hat, attention), repr(attention)))
        first = end + 1
    return tuple(found)


def of_family(name: str) -> tuple[ModelIdentity, dict[str, Any]]:
    family = "llama" if "llama" in FORMS[name].families else "phi3"
    return replace(MODEL, family=family), {**CONFIG, "model_type": family}


def room_of(form: str) -> Room:
    return {"csv": CSV, "gguf": LLAMA_CPP}.get(form) or form_room(form, of_family(form)[0].family)


def there_and_back(form: str, file: FactorFile) -> FactorFile:
    """Export without a word of acceptance, import what was written."""
    taken = take(file, room_of(form))
    given: dict[str, Any] = {"layers": LAYER_COUNT, "theta": 10000.0, "original_length": ORIGINAL, "family": "llama"}
    given["target_length"] = file.regimes[-1].max_length
    if form == "csv":
        return imported_file(Stated(from_csv(to_csv(taken.long), "there")), given)
    if form == "gguf":
        with tempfile.TemporaryDirectory() as folder:
            patch_gguf(tiny_gguf(Path(folder) / "in.gguf"), Path(folder) / "out.gguf", taken)
            return imported_file(read_gguf(Path(folder) / "out.gguf"), given)
    config = of_family(form)[1]
    document = json.loads(json.dumps({**config, **config_patch(form, taken, config)}))
    return imported_file(read_config_form(document, "there"), {**given, "family": config["model_type"]})


def tiny_gguf(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if "alignment" in changes:
        writer.add_custom_alignment(changes["alignment"])
    writer.add_block_count(changes.get("layers", LAYER_COUNT))
    writer.add_context_length(ORIGINAL)
    writer.add_embedding_length(16)
    writer.add_head_count(2)
    writer.add_rope_freq_base(changes.get("theta", 10000.0))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "Ġc"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("rope_freqs.weight", np.ones(PAIRS, np.float32))
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float16).reshape(4, 16))
    writer.add_tensor("output_norm.weight", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(one: Factors, other: Factors, derived: bool) -> bool:
    """To the last bit; where the program works the attention factor out, that is equal up to rounding."""
    if derived and not same_number(one.attention_factor, other.attention_factor):
        return False
    as_rows = one.by_layer() * (LAYER_COUNT if one.shared else 1) == other.by_layer() * (
        LAYER_COUNT if other.shared else 1
    )
    return as_rows and one.n_hat == other.n_hat and (derived or one.attention_factor == other.attention_factor)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted({*FORMS, "csv"})), regimes())
def test_out_and_back_is_the_same_or_refused(form: str, drawn: tuple[Regime, ...]) -> None:
    check(form, drawn)


@settings(max_examples=12, deadline=None)
@given(regimes())
def test_gguf_out_and_back_is_the_same_or_refused(drawn: tuple[Regime, ...]) -> None:
    check("gguf", drawn)


def check(form: str, drawn: tuple[Regime, ...]) -> None:
    model = MODEL if form in ("csv", "gguf") else of_family(form)[0]
    file, room = FactorFile(model, drawn, {}), room_of(form)
    long = drawn[-1]
    low = next((one for one in drawn[:-1] if one.max_length == ORIGINAL), None) if room.short else None
    held = [long] if low is None else [low, long]
    wanted = {
        N_HAT: any(one.factors.n_hat for one in held),
        LAYERS: not room.layers and any(len({*one.factors.by_layer()}) > 1 for one in held),
        REGIMES: len(drawn) > len(held),
        ATTENTION: room.attention == DERIVED
        and not same_number(
            long.factors.attention_factor, attention_factor("su", model.spec, long.max_length / ORIGINAL)
        ),
    }
    try:
        back = there_and_back(form, file)
    except LossError as error:
        named = {loss.name for loss in error.losses}
        assert named <= {*LOSSES}
        assert named - {SHORT_ATTENTION} == {name for name, lost in wanted.items() if lost}
        if SHORT_ATTENTION in named:
            assert low is not None
            assert room.attention in (ONE, DERIVED)
        return
    except LongRopeError:  # a target within the window, which these programs do not scale
        assert long.max_length < ORIGINAL
        return
    assert not any(wanted.values())
    assert same(back.regimes[-1].factors, long.factors, room.attention == DERIVED)
    if low is not None:
        assert same(back.regimes[0].factors, low.factors, room.attention == DERIVED)
    assert from_json(json.loads(json.dumps(to_json(back)))) == back


@pytest.mark.parametrize("form", ["exllamav2", "exllamav3", "transformers4", "vllm", "gguf"])
@pytest.mark.parametrize("low", [1.0, SU])
def test_two_lists_under_the_attention_factors_that_programs_derive(form: str, low: float) -> None:
    """exllamav2 takes 1 for short text and exllamav3 the long one's, which the file alone does not show."""
    short = Regime(1, ORIGINAL, Factors((1.0, 1.5, 1.25, 2.0), 0, low), repr(low))
    check(form, (short, Regime(ORIGINAL + 1, 8 * ORIGINAL, HIGH, "su")))


def single(factors: Factors, *before: Regime) -> FactorFile:
    first = before[-1].max_length + 1 if before else 1
    return FactorFile(MODEL, (*before, Regime(first, 8 * ORIGINAL, factors, "su")), {})


LOW = Factors((1.0, 1.1, 1.2, 1.3))
HIGH = Factors((1.0, 2.0, 4.0, 8.0), 0, SU)


@pytest.mark.parametrize(
    ("form", "file", "loss", "long", "short"),
    [
        ("vllm", single(replace(HIGH, n_hat=4)), N_HAT, HIGH, HIGH),
        ("mlx", single(replace(HIGH, attention_factor=1.5)), ATTENTION, HIGH, HIGH),
        ("transformers", single(replace(HIGH, lambdas=((1.0,) * 4, (4.0,) * 4))), LAYERS, ((2.0,) * 4,), ((2.0,) * 4,)),
        ("mlx", single(HIGH, Regime(1, ORIGINAL, LOW, "none")), REGIMES, HIGH, HIGH),
        ("vllm", single(HIGH, Regime(1, 64, LOW, "none")), REGIMES, HIGH, HIGH),
        (
            "transformers",
            single(HIGH, Regime(1, ORIGINAL, LOW, "none")),
            SHORT_ATTENTION,
            HIGH,
            replace(LOW, attention_factor=SU),
        ),
    ],
)
def test_what_stands_in_for_an_accepted_loss(form: str, file: FactorFile, loss: str, long: Any, short: Any) -> None:
    room = room_of(form)
    with pytest.raises(LossError, match=f"--accept-loss {loss}") as caught:
        take(file, room, {name for name in LOSSES if name != loss})
    assert [found.name for found in caught.value.losses] == [loss]
    taken = take(file, room, {loss})
    for found, wanted in ((taken.long, long), (taken.short, short)):
        if isinstance(wanted, Factors):
            assert found == wanted
        else:
            assert found.by_layer()[0] == pytest.approx(wanted[0])
    assert taken.notes


def test_the_length_chooses_the_regime_and_short_text_may_stay_untouched() -> None:
    file = FactorFile(MODEL, (Regime(1, 512, HIGH, "su"), Regime(513, 4096, LOW, "none")), {})
    room = room_of("vllm")
    assert take(file, room, length=300).long == HIGH
    assert take(file, room, length=300).target_length == 512
    with pytest.raises(LossError, match="--accept-loss regimes"):
        take(file, room, length=513)
    with pytest.raises(LongRopeError, match="No regime serves 4097 tokens"):
        take(file, room, length=4097)
    taken = take(file, room, length=300, short=UNTOUCHED)
    assert taken.short == Factors((1.0,) * 4)
    with pytest.raises(LongRopeError, match="one list of factors for every length"):
        take(file, CSV, short=UNTOUCHED)


def test_an_override_for_sglang_that_never_switches_says_nothing_of_the_window() -> None:
    """Its code turns the token at the switch as if it were the first, so there is none where none is needed."""
    taken = take(single(HIGH), room_of("sglang"))
    patch = config_patch("sglang", taken, CONFIG)
    assert patch["rope_parameters"]["original_max_position_embeddings"] == 8 * ORIGINAL  # type: ignore[index]
    stated = read_config_form(patch, "override.json")
    assert stated.original_length is None
    with pytest.raises(
        LongRopeError, match="does not say original length and layers; give --original-length, --layers"
    ):
        complete(stated, {})


@pytest.mark.parametrize("switches", [False, True])
def test_exllamav2_is_told_the_length_that_its_attention_factor_needs(switches: bool) -> None:
    """It works that out from what it is started for, so that a config alone cannot be right."""
    before = [Regime(1, ORIGINAL, LOW, "none")] if switches else []
    taken = take(single(HIGH, *before), room_of("exllamav2"))
    assert taken.switches == switches
    (note,) = [note for note in form_notes("exllamav2", taken) if "max_seq_len" in note]
    assert f"{SU:.6g} only with max_seq_len = {8 * ORIGINAL}, " in note
    assert f"1 up to {ORIGINAL}." in note


def test_a_gguf_file_keeps_the_rest(tmp_path: Path) -> None:
    taken = take(single(HIGH), LLAMA_CPP)
    patch_gguf(tiny_gguf(tmp_path / "in.gguf"), tmp_path / "out.gguf", taken)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    contents = {name: field.contents() for name, field in reader.fields.items()}
    assert contents["tokenizer.ggml.tokens"] == ["a", "b", "Ġc"]
    assert contents["some.numbers"] == [1, 2, 3]
    assert contents["llama.rope.scaling.type"] == "longrope"
    assert contents["llama.rope.scaling.attn_factor"] == pytest.approx(SU)
    assert contents["llama.context_length"] == 8 * ORIGINAL
    assert "llama.rope.scaling.factor" not in contents  # would slow every position down again
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    kept = {"token_embd.weight", "output_norm.weight"}
    assert {*tensors} == {*kept, "rope_factors_long.weight", "rope_factors_short.weight"}
    assert np.array_equal(tensors["token_embd.weight"], np.arange(64, dtype=np.float16).reshape(4, 16))
    assert np.array_equal(tensors[LONG], np.float32(HIGH.by_layer()[0]))
    again = tmp_path / "again.gguf"
    patch_gguf(tmp_path / "out.gguf", again, taken)
    assert again.read_bytes() == (tmp_path / "out.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.gguf", "in.gguf", "out.gguf"]


@pytest.mark.parametrize("alignment", [8, 64, 256])
def test_a_gguf_file_keeps_its_alignment(tmp_path: Path, alignment: int) -> None:
    taken = take(single(HIGH), LLAMA_CPP)
    patch_gguf(tiny_gguf(tmp_path / "in.gguf", alignment=alignment), tmp_path / "out.gguf", taken)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.alignment == alignment
    assert [tensor.data_offset % alignment for tensor in reader.tensors] == [0] * 4
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(tensors["token_embd.weight"], np.arange(64, dtype=np.float16).reshape(4, 16))
    assert np.array_equal(tensors["output_norm.weight"], np.arange(5, dtype=np.float32))
    assert np.array_equal(tensors[LONG], np.float32(HIGH.by_layer()[0]))
    assert read_gguf(tmp_path / "out.gguf").long == Factors(HIGH.lambdas)


def test_a_copy_that_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, write = tiny_gguf(tmp_path / "in.gguf"), gguf.GGUFWriter.write_tensor_data

    def spoilt(writer: Any, tensor: Any, **how: Any) -> None:
        write(writer, tensor + np.asarray(tensor.shape == (5,), tensor.dtype), **how)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", spoilt)
    with pytest.raises(LongRopeError, match="does not read back"):
        patch_gguf(source, tmp_path / "out.gguf", take(single(HIGH), LLAMA_CPP))
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


@pytest.mark.parametrize("theta", [3580165449.0, 283461213.0, 10000.1, 500000.0])
def test_a_base_that_float32_rounds(tmp_path: Path, theta: float) -> None:
    model = replace(MODEL, theta=theta)
    source, out = tiny_gguf(tmp_path / "in.gguf", theta=theta), tmp_path / "out.gguf"
    patch_gguf(source, out, take(replace(single(HIGH), model=model), LLAMA_CPP))
    given = {"layers": LAYER_COUNT, "original_length": ORIGINAL, "target_length": 8 * ORIGINAL}
    assert imported_file(read_gguf(out), given).model.theta == theta
    plain = replace(read_gguf(out), theta=float(str(np.float32(theta))))  # as another program's file states it
    assert imported_file(plain, {**given, "theta": theta}).model.theta == theta
    with pytest.raises(LongRopeError, match=r"has theta .*, but .* is given"):
        imported_file(plain, {**given, "theta": theta * 1.001})


def test_a_base_that_another_program_changed_is_that(tmp_path: Path) -> None:
    source, out = tiny_gguf(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    patch_gguf(source, out, take(single(HIGH), LLAMA_CPP))
    data, there = out.read_bytes(), struct.pack("<f", 10000.0)
    assert data.count(there) == 1
    out.write_bytes(data.replace(there, struct.pack("<f", 5e5)))
    assert read_gguf(out).theta == 5e5


def test_factors_of_others_in_gguf_come_as_the_shortest_decimals(tmp_path: Path) -> None:
    """Float32 alone: what was 1.37 comes back as 1.37."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "phi3")
    writer.add_tensor("rope_factors_long.weight", np.asarray([1.0, 1.37, 64.08], np.float32))
    writer.add_tensor("rope_factors_short.weight", np.asarray([1.0, 1.01, 1.1], np.float32))
    writer.add_rope_scaling_attn_factors(1.1902381)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stated = read_gguf(tmp_path / "x.gguf")
    assert stated.long.lambdas == (1.0, 1.37, 64.08)
    assert stated.short == Factors((1.0, 1.01, 1.1))
    assert stated.attention == 1.1902381
    assert stated.family == "phi3"


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("qwen2", {}, "llama.cpp loads no factors in qwen2 models"),
        ("phi3", {}, "with architecture llama, but .* has phi3"),
        ("llama", {"layers": 3}, "with block_count 2, but .* has 3"),
        ("llama", {"theta": 5e5}, "with rope.freq_base 10000.0, but .* has 500000.0"),
    ],
)
def test_a_gguf_file_of_another_model_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    source = tiny_gguf(tmp_path / "in.gguf", architecture, **changes)
    with pytest.raises(LongRopeError, match=message):
        patch_gguf(source, tmp_path / "out.gguf", take(single(HIGH), LLAMA_CPP))
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def published(layers: int, pairs: int) -> str:
    """A set such as the authors published: a line a layer, of float32 origin and off the grid, once decreasing."""
    values = [float(f"{float(np.float32(1 + 127 * (pair / pairs) ** 3.1)):.16g}") for pair in range(pairs)]
    values[pairs // 2], values[pairs // 2 + 1] = values[pairs // 2 + 1], values[pairs // 2]
    return "".join(",".join(f"{value:.16g}" for value in values) + "\n" for _ in range(layers))


def numbers(text: str) -> list[list[float]]:
    return [[float(cell) for cell in line.split(",")] for line in text.splitlines()]


@pytest.mark.parametrize(("layers", "pairs"), [(32, 64), (1, 64), (4, 32)])
def test_published_sets_go_in_and_out_unchanged(layers: int, pairs: int) -> None:
    text = published(layers, pairs)
    told = {"layers": layers, "theta": 10000.0, "original_length": 4096, "target_length": 131072}
    file = imported_file(Stated(from_csv(text, "published.csv")), told)
    assert file.regimes[0].factors.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    assert numbers(to_csv(take(file, CSV).long)) == numbers(text)
    if layers > 1:  # as one list, where all are equal
        taken = take(file, room_of("transformers"))
        assert taken.long.lambdas == file.regimes[0].factors.by_layer()[0]
        assert numbers(to_csv(taken.long, layers)) == numbers(text)


@pytest.mark.parametrize("text", ["1\n2\n3\n", "1,2,3", "1, 2 ,3\r\n\r\n", "\ufeff1\n2\n3"])
def test_csv_by_line_and_by_column(text: str) -> None:
    assert from_csv(text.removeprefix("\ufeff"), "x.csv") == Factors((1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.csv holds no factors"),
        ("1,2\n1,2,3\n", "line 1 has 2 factors and line 2 has 3"),
        ("1,two", "line 1, column 2: expected a number, found 'two'"),
        ("1,nan", "line 1, column 2: expected a finite number above 0, found nan"),
        ("1,2\n0,1", "line 2, column 1: expected a finite number above 0, found 0.0"),
        ("1,-2", "column 2: expected a finite number above 0, found -2.0"),
        ("1,1_0", "expected a number, found '1_0'"),
        ("1,=1+1", "expected a number"),
        ("1," + "9" * 500, "expected a number, found '9999"),
        ('1,"2', "expected a number|not CSV"),
    ],
)
def test_csv_that_is_none(text: str, message: str) -> None:
    if text == '1,"2':  # a quote that is not closed is read to the end
        assert from_csv(text, "x.csv") == Factors((1.0, 2.0))
        return
    with pytest.raises(LongRopeError, match=message):
        from_csv(text, "x.csv")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "the file: expected an object"),
        ({}, "rope_parameters or rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.rope_type: expected longrope, found 'linear'"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.long_factor: expected a list that is not empty"),
        (
            {"rope_scaling": {"type": "su", "long_factor": [1, "x"], "short_factor": [1, 1]}},
            r"rope_scaling.long_factor\[1\]: expected a finite number above 0",
        ),
        (
            {"rope_scaling": {"type": "su", "long_factor": [1], "short_factor": [1, 1]}},
            "long_factor has 1 factors and short_factor 2",
        ),
        (
            {"rope_scaling": {"type": "su", "long_factor": [1], "short_factor": [1]}, "max_position_embeddings": 1.5},
            "expected a whole number",
        ),
    ],
)
def test_a_config_without_factors(document: object, message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        read_config_form(document, "config.json")
