"""Evaluations of others, up to the figures that are drawn of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from searcher.errors import LongRopeError
from storage.measured import read_evaluation
from storage.page_measured import measured_figures


@pytest.mark.parametrize("key", ["perplexity", "sliding"])
@pytest.mark.parametrize("value", [1e-300, 1.0, 1e300, 1.01e300, 1.75e308])
@pytest.mark.parametrize("other", [None, 5.0])
def test_any_perplexity_is_drawn_or_refused(tmp_path: Path, key: str, value: float, other: float | None) -> None:
    rows = {"100": value} | ({} if other is None else {"200": other})
    given: object = {"pi": rows}
    if key == "sliding":
        row = {"method": "pi", "attention": "own"}
        given = [{**row, "length": int(n), "sliding": {"perplexity": v}} for n, v in rows.items()]
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"model": "m", "lengths": [100], key: given}))
    if value > 1e300:
        with pytest.raises(LongRopeError, match=r"expected a perplexity of at most 1e\+300"):
            read_evaluation(path)
        return
    figures = measured_figures(read_evaluation(path), 1)
    assert [figure.node() is not None for figure in figures] == [True]
