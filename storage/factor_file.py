"""The factor file: rescale factors by regime, with the model they belong to and where they come from. JSON.

Equal contents give equal bytes: keys in fixed or sorted order, float64 in its shortest exact form, no time, host or
path. The same checks are made, field by field, before a file is written and after one is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from searcher.errors import LongRopeError
from searcher.rope import Factors, RopeSpec, attention_factor
from storage.checks import Fault, expected, inside, items, mapping, number, plain, read_json, record, text, whole

FORMAT = "longrope-factors"
VERSION = 1
PAIRINGS = ("half-split", "interleaved")
CONVENTION = (
    "angle_i(m) = m * theta^(-2i/d) / lambda_i at positions m >= n_hat, undivided below n_hat; d is the rotary "
    "dimension, i = 0 the highest frequency. Lambdas are absolute, against the unscaled RoPE: one list for all layers, "
    "or one list a layer. The attention factor multiplies cos and sin at m >= n_hat. half-split: dimension i turns "
    "with i + d/2; interleaved: 2i with 2i + 1. A regime serves sequences of min_length to max_length tokens, both "
    "included."
)


@dataclass(frozen=True)
class ModelIdentity:
    """The model that factors belong to, and its unscaled rotary geometry.

    Attributes
    ----------
    name: for people.
    weights_sha256: 64 hexadecimal digits over weights and config.
    family: transformers' ``model_type``.
    theta, rotary_dim, original_length, layers: as in ``searcher.rope.RopeSpec``.
    pairing: which dimensions of a head turn together, one of PAIRINGS.
    shipped_scaling: what the model's own config scales its RoPE by. Stated only: lambda is absolute.
    """

    name: str
    weights_sha256: str
    family: str
    theta: float
    rotary_dim: int
    original_length: int
    layers: int
    pairing: str
    shipped_scaling: Mapping[str, object] | None = None

    @property
    def spec(self) -> RopeSpec:
        """The geometry alone."""
        return RopeSpec(self.theta, self.rotary_dim, self.original_length, self.layers, self.family)


@dataclass(frozen=True)
class RegimeScore:
    """Perplexity under a regime's factors, and on what.

    Attributes
    ----------
    perplexity: exp(total negative log-likelihood in nats / ``tokens``).
    tokens: tokens scored.
    documents: windows scored.
    length: tokens of a window.
    """

    perplexity: float
    tokens: int
    documents: int
    length: int


@dataclass(frozen=True)
class WithoutNHat:
    """The best factors with n_hat = 0, for targets that cannot hold n_hat."""

    factors: Factors
    scores: Mapping[str, RegimeScore] = field(default_factory=dict)


@dataclass(frozen=True)
class Regime:
    """Factors for sequences of ``min_length`` to ``max_length`` tokens, both included.

    Attributes
    ----------
    attention_policy: what the attention factor was chosen by: su, yarn, none, or a number as text.
    scores: set of documents (``selection``, ``test``; ``short`` for text within the original length) to its score.
    """

    min_length: int
    max_length: int
    factors: Factors
    attention_policy: str
    scores: Mapping[str, RegimeScore] = field(default_factory=dict)
    without_n_hat: WithoutNHat | None = None


@dataclass(frozen=True)
class FactorFile:
    """One or more regimes of one model.

    Attributes
    ----------
    regimes: ascending and disjoint; there may be gaps.
    provenance: JSON values. ``study`` (name), ``seed``, ``data`` (hashes) and ``software`` (versions) must be there,
        study and seed as None where no search was run; whatever else decided the factors may be.
    """

    model: ModelIdentity
    regimes: tuple[Regime, ...]
    provenance: Mapping[str, object]


def rendered(file: FactorFile) -> str:
    """The text of a factor file.

    Raises
    ------
    LongRopeError
        A field is not valid.
    """
    document = _document(file)
    try:
        _parse(document)
    except Fault as fault:
        raise LongRopeError(f"These factors cannot be written to a file: {fault}.") from fault
    return _render(document) + "\n"


def write(path: Path, file: FactorFile) -> None:
    """Write a factor file in one step: a reader sees the old file or the new one.

    Raises
    ------
    LongRopeError
        A field is not valid, or the file cannot be written (no space, no permission).
    """
    text = rendered(file)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as handle:
                handle.write(text.encode())
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LongRopeError(f"The factor file {path} cannot be written: {error.strerror or error}.") from error


def to_json(file: FactorFile) -> dict[str, object]:
    """The file as JSON values; ``from_json`` gives an equal one back."""
    return _document(file)


def from_json(document: object) -> FactorFile:
    """A factor file from JSON values, checked.

    Raises
    ------
    LongRopeError
        A field is not valid.
    """
    try:
        return _parse(document)
    except Fault as fault:
        raise LongRopeError(f"This is not a valid factor file: {fault}.") from fault


def read(path: Path) -> FactorFile:
    """Read and check a factor file.

    Raises
    ------
    LongRopeError
        It cannot be read, is not JSON, or a field is not valid: the message names file and field.
    """
    document = read_json(path)
    try:
        return _parse(document)
    except Fault as fault:
        raise LongRopeError(f"{path} is not a valid factor file: {fault}.") from fault


def warnings(file: FactorFile) -> list[str]:
    """What is allowed but worth a look, a sentence each: factors that decrease, or lie below 1."""
    found: list[str] = []
    for place, regime in enumerate(file.regimes):
        blocks = [(f"regimes[{place}]", regime.factors)]
        if regime.without_n_hat is not None:
            blocks.append((f"regimes[{place}].without_n_hat", regime.without_n_hat.factors))
        for where, factors in blocks:
            rows = factors.by_layer()
            falls = sum(after < before for row in rows for before, after in pairwise(row))
            if falls:
                found.append(f"{where}.lambdas decrease {_times(falls)}; a search gives non-decreasing ones.")
            below = sum(value < 1 for row in rows for value in row)
            if below:
                found.append(f"{where}.lambdas lie below 1 {_times(below)}, which turns faster than the model's RoPE.")
    return found


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _document(file: FactorFile) -> dict[str, object]:
    """The file as JSON objects, keys in the order in which they are written."""
    model = file.model
    return {
        "format": FORMAT,
        "version": VERSION,
        "convention": CONVENTION,
        "model": {
            "name": model.name,
            "weights_sha256": model.weights_sha256,
            "family": model.family,
            "theta": float(model.theta),
            "rotary_dim": model.rotary_dim,
            "original_length": model.original_length,
            "layers": model.layers,
            "pairing": model.pairing,
            "shipped_scaling": None if model.shipped_scaling is None else _sorted(model.shipped_scaling),
        },
        "regimes": [_regime_document(regime) for regime in file.regimes],
        "provenance": _sorted(file.provenance),
    }


def _regime_document(regime: Regime) -> dict[str, object]:
    document: dict[str, object] = {
        "min_length": regime.min_length,
        "max_length": regime.max_length,
        "lambdas": _lambdas_document(regime.factors),
        "n_hat": regime.factors.n_hat,
        "attention_factor": float(regime.factors.attention_factor),
        "attention_policy": regime.attention_policy,
        "scores": _scores_document(regime.scores),
    }
    if regime.without_n_hat is not None:
        factors = regime.without_n_hat.factors
        if factors.n_hat:
            raise LongRopeError(f"The factors of without_n_hat have n_hat = {factors.n_hat}; they must have 0.")
        document["without_n_hat"] = {
            "lambdas": _lambdas_document(factors),
            "attention_factor": float(factors.attention_factor),
            "scores": _scores_document(regime.without_n_hat.scores),
        }
    return document


def _lambdas_document(factors: Factors) -> list[object]:
    rows = [[float(value) for value in row] for row in factors.by_layer()]
    return list(rows[0]) if factors.shared else list(rows)


def _scores_document(scores: Mapping[str, RegimeScore]) -> dict[str, object]:
    return {
        part: {
            "perplexity": float(score.perplexity),
            "tokens": score.tokens,
            "documents": score.documents,
            "length": score.length,
        }
        for part, score in sorted(scores.items())
    }


def _sorted(value: Mapping[str, object]) -> dict[str, object]:
    """A free-form mapping in sorted order at every level, so that the order of insertion leaves no trace."""
    return {key: _ordered(value[key]) for key in sorted(value, key=str)}


def _ordered(value: object) -> object:
    if isinstance(value, Mapping):
        return _sorted(value)
    return [_ordered(inner) for inner in value] if isinstance(value, list | tuple) else value


def _render(value: object, indent: str = "") -> str:
    """JSON, two spaces a level; a list of plain values on one line, so that a list of factors reads as one."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {_render(inner, deeper)}" for key, inner in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return "[\n" + ",\n".join(deeper + _render(inner, deeper) for inner in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def _parse(document: object) -> FactorFile:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Fault(f'expected an object with "format": "{FORMAT}"')
    version = whole(document.get("version"), "version", 1)
    if version > VERSION:
        raise Fault(f"it has version {version} and this program reads up to {VERSION}; upgrade longrope-search")
    top = record(document, "", ("format", "version", "convention", "model", "regimes", "provenance"))
    text(top["convention"], "convention")
    model = _parse_model(top["model"])
    regimes: list[Regime] = []
    for place, value in enumerate(items(top["regimes"], "regimes")):
        regime = _parse_regime(value, f"regimes[{place}]", model)
        if regimes and regime.min_length <= regimes[-1].max_length:
            beyond = f"a length above {regimes[-1].max_length}, where regimes[{place - 1}] ends"
            raise expected(f"regimes[{place}].min_length", beyond, regime.min_length)
        regimes.append(regime)
    return FactorFile(model, tuple(regimes), _parse_provenance(top["provenance"]))


def _parse_model(value: object) -> ModelIdentity:
    names = ("name", "weights_sha256", "family", "theta", "rotary_dim", "original_length", "layers", "pairing")
    model = record(value, "model", (*names, "shipped_scaling"))
    digest, pairing, scaling = model["weights_sha256"], model["pairing"], model["shipped_scaling"]
    if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise expected("model.weights_sha256", "64 lower-case hexadecimal digits", digest)
    if not (isinstance(pairing, str) and pairing in PAIRINGS):
        raise expected("model.pairing", " or ".join(PAIRINGS), pairing)
    rotary_dim = whole(model["rotary_dim"], "model.rotary_dim", 4)
    if rotary_dim % 2:
        raise expected("model.rotary_dim", "an even number", rotary_dim)
    return ModelIdentity(
        name=text(model["name"], "model.name"),
        weights_sha256=digest,
        family=text(model["family"], "model.family"),
        theta=number(model["theta"], "model.theta", above=1),
        rotary_dim=rotary_dim,
        original_length=whole(model["original_length"], "model.original_length", 2),
        layers=whole(model["layers"], "model.layers", 1),
        pairing=pairing,
        shipped_scaling=None if scaling is None else _plain_mapping(scaling, "model.shipped_scaling"),
    )


def _parse_regime(value: object, where: str, model: ModelIdentity) -> Regime:
    names = ("min_length", "max_length", "lambdas", "n_hat", "attention_factor", "attention_policy", "scores")
    regime = record(value, where, names, ("without_n_hat",))
    shortest = whole(regime["min_length"], f"{where}.min_length", 1)
    longest = whole(regime["max_length"], f"{where}.max_length", shortest)
    policy = text(regime["attention_policy"], f"{where}.attention_policy")
    try:
        attention_factor(policy, model.spec, 1.0)
    except LongRopeError:
        what = "su, yarn, none or a positive number as text"
        raise expected(f"{where}.attention_policy", what, policy) from None
    without_n_hat = None
    if "without_n_hat" in regime:
        place = f"{where}.without_n_hat"
        block = record(regime["without_n_hat"], place, ("lambdas", "attention_factor", "scores"))
        without_n_hat = WithoutNHat(_parse_factors(block, place, model), _parse_scores(block["scores"], place))
    factors = _parse_factors(regime, where, model)
    return Regime(shortest, longest, factors, policy, _parse_scores(regime["scores"], where), without_n_hat)


def _parse_factors(block: dict[str, object], where: str, model: ModelIdentity) -> Factors:
    listed = items(block["lambdas"], f"{where}.lambdas")
    n_hat = whole(block.get("n_hat", 0), f"{where}.n_hat", 0)
    attention = number(block["attention_factor"], f"{where}.attention_factor")
    if not isinstance(listed[0], list):
        return Factors(_parse_row(listed, f"{where}.lambdas", model), n_hat, attention)
    if len(listed) != model.layers:
        raise expected(f"{where}.lambdas", f"{model.layers} lists, one for each of model.layers", listed)
    rows = tuple(_parse_row(row, f"{where}.lambdas[{layer}]", model) for layer, row in enumerate(listed))
    return Factors(rows, n_hat, attention)


def _parse_row(value: object, where: str, model: ModelIdentity) -> tuple[float, ...]:
    row = items(value, where)
    if len(row) != model.rotary_dim // 2:
        raise expected(where, f"{model.rotary_dim // 2} factors, half of model.rotary_dim", row)
    return tuple(number(factor, f"{where}[{pair}]") for pair, factor in enumerate(row))


def _parse_scores(value: object, where: str) -> dict[str, RegimeScore]:
    scores = {}
    for part, entry in mapping(value, f"{where}.scores").items():
        place = inside(f"{where}.scores", text(part, f"{where}.scores key"))
        score = record(entry, place, ("perplexity", "tokens", "documents", "length"))
        scores[part] = RegimeScore(
            perplexity=number(score["perplexity"], f"{place}.perplexity"),
            tokens=whole(score["tokens"], f"{place}.tokens", 1),
            documents=whole(score["documents"], f"{place}.documents", 1),
            length=whole(score["length"], f"{place}.length", 2),
        )
    return scores


def _parse_provenance(value: object) -> dict[str, object]:
    provenance = _plain_mapping(value, "provenance")
    for key in ("study", "seed", "data", "software"):
        if key not in provenance:
            raise Fault(f"provenance.{key}: this field is missing")
    study, seed = provenance["study"], provenance["seed"]
    if study is not None:
        text(study, "provenance.study")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise expected("provenance.seed", "a whole number or null", seed)
    mapping(provenance["data"], "provenance.data")
    for name, version in mapping(provenance["software"], "provenance.software").items():
        text(version, inside("provenance.software", name))
    return provenance


def _plain_mapping(value: object, where: str) -> dict[str, object]:
    plain(mapping(value, where), where)
    return mapping(value, where)
