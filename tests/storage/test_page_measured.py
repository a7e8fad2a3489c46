"""Figures of an evaluation: a length that is no power of two, and a colour for every method there is."""

from __future__ import annotations

import re

from searcher.baselines import BASELINES
from storage.measured import Bucket, Measured
from storage.page_measured import by_position, coloured
from storage.svg import WIDTH


def test_positions_reach_the_end_of_the_window() -> None:
    buckets = [Bucket(1, 256, 9.0), Bucket(256, 512, 8.0), Bucket(512, 768, 7.0)]
    (figure,) = by_position(Measured(positions={"yarn": {768: buckets}}), 0)
    (_, plot), *_ = figure.drawings
    area = next(node for node in plot.iter("svg") if node.get("class") == "area")
    (line,) = area.iter("path")
    across = [float(point.split()[0]) for point in re.split("[ML]", line.get("d") or "")[1:]]
    wide = float(area.get("width") or "nan")
    assert across[0] > 0
    assert 0.9 * wide < across[-1] <= wide < WIDTH
    assert across[-1] - across[-2] > 0.02 * wide  # from 512 to 768


def test_every_method_of_an_evaluation_has_a_colour_of_its_own() -> None:
    methods = [*BASELINES, "attention_sinks", "searched"]
    assert len({*coloured(methods).values()}) == len(methods)
