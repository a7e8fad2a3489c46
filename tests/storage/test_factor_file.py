"""The factor file: exact round trips, canonical bytes, and errors that name file and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec
from storage.checks import MAX_BYTES
from storage.factor_file import (
    FactorFile,
    ModelIdentity,
    Regime,
    RegimeScore,
    WithoutNHat,
    read,
    warnings,
    write,
)
from tests.limits import files_no_larger_than

MODEL = ModelIdentity(
    name="reference",
    weights_sha256="0f" * 32,
    family="llama",
    theta=10000.0,
    rotary_dim=8,
    original_length=256,
    layers=2,
    pairing="half-split",
    shipped_scaling={"rope_type": "linear", "factor": 2.0},
)
PROVENANCE: dict[str, object] = {
    "study": "first",
    "seed": 7,
    "search": {"population": 64, "bounds": [1.0, 10.0]},
    "data": {"test": ["ab" * 32]},
    "software": {"torch": "2.13.0"},
}
SCORE = RegimeScore(perplexity=11.73, tokens=2047 * 5, documents=5, length=2048)
EXAMPLE = FactorFile(
    MODEL,
    (
        Regime(1, 256, Factors((1.0, 1.0, 1.0, 1.0)), "none", {"test": SCORE}),
        Regime(
            257,
            2048,
            Factors((1.0, 1.37, 4.2, 8.0), n_hat=8, attention_factor=1.2),
            "su",
            {"selection": SCORE, "test": replace(SCORE, perplexity=11.7)},
            WithoutNHat(Factors((1.0, 1.4, 4.2, 8.0), attention_factor=1.2), {"test": SCORE}),
        ),
    ),
    PROVENANCE,
)

positive = st.floats(min_value=5e-324, max_value=1.7976931348623157e308)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
whole = st.integers(1, 2**53)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**36), 10**36)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
scores = st.dictionaries(words, st.builds(RegimeScore, positive, whole, whole, st.integers(2, 2**53)), max_size=3)


@st.composite
def factor_files(draw: st.DrawFn) -> FactorFile:
    pairs, layers = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    row = st.lists(positive, min_size=pairs, max_size=pairs).map(tuple)
    lambdas = row | st.lists(row, min_size=layers, max_size=layers).map(tuple)
    model = ModelIdentity(
        draw(words),
        draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        draw(words),
        draw(st.floats(min_value=1, max_value=1e300, exclude_min=True)),
        2 * pairs,
        draw(st.integers(2, 2**53)),
        layers,
        draw(st.sampled_from(["half-split", "interleaved"])),
        draw(st.none() | st.dictionaries(words, json_values, max_size=3)),
    )
    ends = draw(st.lists(whole, min_size=2, max_size=6, unique=True).map(sorted))
    regimes = []
    for low, high in zip(ends[::2], ends[1::2], strict=False):
        policy = draw(st.sampled_from(["su", "yarn", "none"]) | positive.map(repr))
        other = st.builds(WithoutNHat, st.builds(Factors, lambdas, st.just(0), positive), scores)
        factors = Factors(draw(lambdas), draw(st.integers(0, 300)), draw(positive))
        regimes.append(Regime(low, high, factors, policy, draw(scores), draw(st.none() | other)))
    provenance = draw(st.dictionaries(words, json_values, max_size=3)) | {
        "study": draw(st.none() | words),
        "seed": draw(st.none() | st.integers(0, 2**120)),
        "data": draw(st.dictionaries(words, json_values, max_size=2)),
        "software": draw(st.dictionaries(words, words, max_size=2)),
    }
    return FactorFile(model, tuple(regimes), provenance)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=factor_files())
def test_round_trip_is_exact_and_its_bytes_are_stable(tmp_path: Path, file: FactorFile) -> None:
    path = tmp_path / "a.json"
    write(path, file)
    again = read(path)
    assert again == file
    assert [r.factors.to_bytes() for r in again.regimes] == [r.factors.to_bytes() for r in file.regimes]
    first = path.read_bytes()
    write(path, again)
    assert path.read_bytes() == first
    assert json.loads(first)["regimes"]  # any JSON reader takes it


def test_order_of_insertion_and_number_types_leave_no_trace(tmp_path: Path) -> None:
    def turned(value: Any) -> Any:
        return {key: turned(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    regimes = tuple(replace(regime, scores=turned(regime.scores)) for regime in EXAMPLE.regimes)
    model = replace(MODEL, theta=10000, shipped_scaling=turned(MODEL.shipped_scaling))
    write(tmp_path / "a.json", EXAMPLE)
    write(tmp_path / "b.json", FactorFile(model, regimes, turned(PROVENANCE)))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_file_reads_well(tmp_path: Path) -> None:
    """One line for a list of factors, the convention in words, nothing but what was put in."""
    path = tmp_path / "a.json"
    write(path, EXAMPLE)
    lines = path.read_text().splitlines()
    assert '      "lambdas": [1.0, 1.37, 4.2, 8.0],' in lines
    assert lines[1:3] == ['  "format": "longrope-factors",', '  "version": 1,']
    assert path.read_bytes().endswith(b"}\n")
    assert "n_hat" in json.loads(path.read_text())["convention"]
    assert not [entry for entry in tmp_path.iterdir() if entry != path]


def test_per_layer_factors_are_a_line_each(tmp_path: Path) -> None:
    rows = ((1.0, 2.0, 3.0, 4.0), (1.0, 2.5, 3.0, 4.0))
    file = replace(EXAMPLE, regimes=(replace(EXAMPLE.regimes[0], factors=Factors(rows)),))
    write(tmp_path / "a.json", file)
    assert "        [1.0, 2.5, 3.0, 4.0]" in (tmp_path / "a.json").read_text().splitlines()
    assert read(tmp_path / "a.json") == file


def test_the_identity_gives_the_geometry() -> None:
    assert MODEL.spec == RopeSpec(10000.0, 8, 256, 2, "llama")


def _set(*keys: str | int, to: object) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return change


def _drop(*keys: str | int) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


BROKEN = [
    (_set("regimes", 0, "lambdas", 3, to=-1.0), "regimes[0].lambdas[3]: expected a finite number above 0, found -1.0"),
    (_set("regimes", 0, "lambdas", 3, to=0), "regimes[0].lambdas[3]: expected a finite number above 0, found 0"),
    (_set("regimes", 0, "lambdas", 3, to=float("nan")), "regimes[0].lambdas[3]: expected a finite number above 0"),
    (_set("regimes", 0, "lambdas", 3, to=float("inf")), "regimes[0].lambdas[3]: expected a finite number above 0"),
    (_set("regimes", 0, "lambdas", 3, to=True), "regimes[0].lambdas[3]: expected a finite number above 0, found true"),
    (_set("regimes", 0, "lambdas", 3, to="4"), 'regimes[0].lambdas[3]: expected a finite number above 0, found "4"'),
    (
        _set("regimes", 0, "lambdas", 3, to=10**400),
        "regimes[0].lambdas[3]: expected a finite number above 0, found inf",
    ),
    (
        _set("regimes", 0, "lambdas", 3, to=[]),
        "regimes[0].lambdas[3]: expected a finite number above 0, found a list of 0",
    ),
    (_set("regimes", 1, "lambdas", to=[1.0] * 3), "regimes[1].lambdas: expected 4 factors, half of model.rotary_dim"),
    (_set("regimes", 1, "lambdas", to=[]), "regimes[1].lambdas: expected a list that is not empty, found a list of 0"),
    (_set("regimes", 1, "lambdas", to=None), "regimes[1].lambdas: expected a list that is not empty, found null"),
    (_set("regimes", 1, "lambdas", to=[[1.0] * 4] * 3), "regimes[1].lambdas: expected 2 lists, one for each of"),
    (_set("regimes", 1, "lambdas", to=[[1.0] * 4, [1.0] * 5]), "regimes[1].lambdas[1]: expected 4 factors"),
    (_set("regimes", 1, "lambdas", to=[[1.0] * 4, [1, 1, 1, 0]]), "regimes[1].lambdas[1][3]: expected a finite number"),
    (_set("regimes", 1, "lambdas", to=[[1.0] * 4, 1.0]), "regimes[1].lambdas[1]: expected a list"),
    (_set("regimes", 1, "without_n_hat", "lambdas", 0, to="x"), "regimes[1].without_n_hat.lambdas[0]: expected"),
    (_set("regimes", 1, "without_n_hat", "n_hat", to=4), "regimes[1].without_n_hat.n_hat: there is no such field"),
    (_set("regimes", 1, "n_hat", to=-1), "regimes[1].n_hat: expected a whole number from 0"),
    (_set("regimes", 1, "n_hat", to=1.0), "regimes[1].n_hat: expected a whole number from 0 to"),
    (_set("regimes", 1, "n_hat", to=True), "regimes[1].n_hat: expected a whole number from 0 to"),
    (_set("regimes", 1, "attention_factor", to=0.0), "regimes[1].attention_factor: expected a finite number above 0"),
    (_set("regimes", 1, "attention_policy", to="mean"), "regimes[1].attention_policy: expected su, yarn, none or a"),
    (_set("regimes", 1, "min_length", to=256), "regimes[1].min_length: expected a length above 256, where regimes[0]"),
    (_set("regimes", 1, "max_length", to=256), "regimes[1].max_length: expected a whole number from 257 to"),
    (_set("regimes", 1, "max_length", to=10**60), "regimes[1].max_length: expected a whole number from 257 to"),
    (_set("regimes", 1, "scores", "test", "perplexity", to=-3.0), "regimes[1].scores.test.perplexity: expected"),
    (_set("regimes", 1, "scores", "test", "tokens", to=0), "regimes[1].scores.test.tokens: expected a whole number"),
    (_drop("regimes", 1, "scores", "test", "length"), "regimes[1].scores.test.length: this field is missing"),
    (_set("regimes", 1, "scores", to=[]), "regimes[1].scores: expected an object, found a list of 0"),
    (_set("regimes", 1, to=None), "regimes[1]: expected an object, found null"),
    (_set("regimes", to=[]), "regimes: expected a list that is not empty"),
    (_drop("regimes", 1, "lambdas"), "regimes[1].lambdas: this field is missing"),
    (_drop("regimes"), "regimes: this field is missing"),
    (_set("regimes", 0, "lamdbas", to=[1.0]), "regimes[0].lamdbas: there is no such field"),
    (_set("model", "rotary_dim", to=7), "model.rotary_dim: expected an even number, found 7"),
    (_set("model", "rotary_dim", to=10), "regimes[0].lambdas: expected 5 factors"),
    (_set("model", "theta", to=1), "model.theta: expected a finite number above 1, found 1"),
    (_set("model", "layers", to=0), "model.layers: expected a whole number from 1"),
    (_set("model", "original_length", to=None), "model.original_length: expected a whole number from 2"),
    (_set("model", "pairing", to="halves"), 'model.pairing: expected half-split or interleaved, found "halves"'),
    (
        _set("model", "pairing", to=["half-split"]),
        "model.pairing: expected half-split or interleaved, found a list of 1",
    ),
    (_set("model", "weights_sha256", to="0F" * 32), "model.weights_sha256: expected 64 lower-case hexadecimal digits"),
    (_set("model", "name", to=""), "model.name: expected a text that is not empty"),
    (_set("model", "name", to="\ud800"), "model.name: expected Unicode text"),
    (_set("model", "shipped_scaling", to=4), "model.shipped_scaling: expected an object, found 4"),
    (_drop("model", "family"), "model.family: this field is missing"),
    (_set("provenance", "seed", to="7"), 'provenance.seed: expected a whole number or null, found "7"'),
    (_set("provenance", "data", "x", to=[{"y": float("-inf")}]), "provenance.data.x[0].y: expected a finite number"),
    (_set("provenance", "software", to={"torch": 2}), "provenance.software.torch: expected a text"),
    (_drop("provenance", "study"), "provenance.study: this field is missing"),
    (_drop("convention"), "convention: this field is missing"),
    (_set("version", to=2), "it has version 2 and this program reads up to 1; upgrade"),
    (_set("version", to=0), "version: expected a whole number from 1"),
    (_drop("version"), "version: expected a whole number from 1"),
    (_set("format", to="gguf"), 'expected an object with "format": "longrope-factors"'),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message[:50] for _, message in BROKEN])
def test_an_error_names_file_and_field(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    path = tmp_path / "broken.json"
    write(path, EXAMPLE)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(LongRopeError) as caught:
        read(path)
    assert f"broken.json is not a valid factor file: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def _nested(depth: int) -> bytes:
    return b'{"format": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON: Expecting value at line 1, column 1"),
        (b"lambda,1.0\n", "not valid JSON: Expecting value"),
        (b"[1]", '"format": "longrope-factors"'),
        (b'{"a": "\xff"}', "must be JSON in UTF-8, but byte 7 is not UTF-8"),
        ("{}".encode("utf-16"), "must be JSON in UTF-8"),
        (b'{"theta": 1, "b": 2, "theta": 3}', "the key theta comes twice"),
        (b'{"a\\n\\u001b[2J": 1, "a\\n\\u001b[2J": 3}', r'the key "a\n\u001b[2J" comes twice'),
        (_nested(100_000), "nested too deeply"),
        (_nested(300), '"format": "longrope-factors"'),
        (b'{"format": "longrope-factors", "version": ' + b"9" * 5000 + b"}", "version: expected a whole number"),
    ],
)
def test_what_is_no_factor_file_at_all_is_told_in_a_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(LongRopeError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_provenance_is_nested_to_a_bound(tmp_path: Path) -> None:
    deep: dict[str, object] = {}
    for _ in range(50):
        deep = {"in": deep}
    with pytest.raises(LongRopeError, match=r"provenance\.search\.in.*nested more than 32 levels deep"):
        write(tmp_path / "a.json", replace(EXAMPLE, provenance={**PROVENANCE, "search": deep}))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(path, EXAMPLE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == EXAMPLE


def test_a_huge_file_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    with path.open("wb") as handle:
        handle.truncate(2**40)  # sparse: a terabyte that no test machine could hold in memory
    with pytest.raises(LongRopeError, match=f"larger than {MAX_BYTES >> 20} MiB"):
        read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="No such file"):
        read(tmp_path / "missing.json")
    with pytest.raises(LongRopeError, match="Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (replace(EXAMPLE, regimes=()), "regimes: expected a list that is not empty"),
        (replace(EXAMPLE, regimes=EXAMPLE.regimes[::-1]), "regimes[1].min_length: expected a length above 2048"),
        (replace(EXAMPLE, model=replace(MODEL, layers=True)), "model.layers: expected a whole number"),
        (
            replace(EXAMPLE, provenance={**PROVENANCE, "data": {"path": Path("x")}}),
            "provenance.data.path: expected a JSON",
        ),
        (
            replace(EXAMPLE, provenance={**PROVENANCE, "seed": 10**40}),
            "provenance.seed: expected a whole number of fewer",
        ),
        (
            replace(EXAMPLE, regimes=(replace(EXAMPLE.regimes[0], scores={"test": replace(SCORE, perplexity=1e309)}),)),
            "regimes[0].scores.test.perplexity: expected a finite number above 0, found inf",
        ),
        (
            replace(EXAMPLE, regimes=(replace(EXAMPLE.regimes[0], without_n_hat=WithoutNHat(Factors((1.0,) * 4, 4))),)),
            "without_n_hat have n_hat = 4",
        ),
    ],
)
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, file: FactorFile, message: str) -> None:
    with pytest.raises(LongRopeError) as caught:
        write(tmp_path / "a.json", file)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(path, EXAMPLE)
    before = path.read_bytes()
    with files_no_larger_than(1000), pytest.raises(LongRopeError, match="cannot be written: File too large"):
        write(path, replace(EXAMPLE, model=replace(MODEL, name="n" * 2000)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(LongRopeError, match="No such file or directory"):
        write(tmp_path / "no" / "a.json", EXAMPLE)


def test_odd_factors_are_allowed_and_told() -> None:
    """The authors' own published factors decrease in places, so that is no error."""
    odd = Regime(1, 9, Factors((0.5, 3.0, 2.0, 1.0), 2), "su", {}, WithoutNHat(Factors((2.0, 1.0, 1.0, 4.0))))
    assert warnings(EXAMPLE) == []
    first, below, second = warnings(replace(EXAMPLE, regimes=(odd,)))
    assert first.startswith("regimes[0].lambdas decrease 2 times")
    assert below.startswith("regimes[0].lambdas lie below 1 once")
    assert second.startswith("regimes[0].without_n_hat.lambdas decrease once")
