"""``longrope report``: what is on the page is what the store holds, and nothing on it is markup that was not meant."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from report_reader import AWAY, Page, assert_inert

from storage.repository import Repository
from tests.conftest import Longrope

SEARCH_FIGURES = ["convergence-0", "factors-0", "spread-0", "n-hat-0", "refinement-0", "methods-0", "time", "workers"]
SCRIPT = "<script>alert(1)</script>\"'&amp;"


@pytest.fixture(scope="module")
def finished(small_study: list[str], longrope_in: Longrope, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study ``s`` in its store."""
    folder = tmp_path_factory.mktemp("finished")
    ended = longrope_in(folder, "launch", *small_study, "--study=s")
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def page(finished: Path, longrope_in: Longrope) -> Page:
    ended = longrope_in(finished, "report", "s", "--json")
    assert json.loads(ended.out) == {
        **{"study": "s", "written": "s-report.html", "status": "finished", "figures": len(SEARCH_FIGURES)}
    }
    return Page.read(finished / "s-report.html")


def test_every_figure_is_there_with_a_chart_and_a_table(page: Page) -> None:
    assert page.figures == SEARCH_FIGURES
    assert page.plots == dict.fromkeys(SEARCH_FIGURES, 1)
    assert all(len(rows) >= 2 and len({len(row) for row in rows}) == 1 for rows in page.tables.values())
    assert {link.removeprefix("#") for link in page.links} <= page.targets


def test_nothing_is_fetched_and_nothing_runs(finished: Path, page: Page) -> None:
    text = (finished / "s-report.html").read_text()
    assert not AWAY.search(text)
    assert "default-src 'none'" in text
    assert_inert(page)


def test_convergence_is_the_trajectory(finished: Path, page: Page) -> None:
    repository = Repository(f"sqlite:///{finished / 'longrope.db'}")
    points, cost = repository.trajectory("s"), repository.cost("s")
    assert cost.multiple is not None
    bests = [float(value) for value in page.column("convergence-0", "best perplexity")]
    assert bests == sorted(bests, reverse=True)
    assert bests[-1] == pytest.approx(math.exp(points[-1].loss), abs=1e-4)
    last = next(point for point in points if point.loss == points[-1].loss)
    paid = last.forwards + cost.multiple * last.gradients
    assert float(page.column("convergence-0", "cost")[-1].replace(",", "")) == pytest.approx(paid, abs=0.51)


def test_factors_are_the_factor_files_beside_the_baselines(finished: Path, page: Page) -> None:
    file = json.loads((finished / "s-factors.json").read_text())
    found = [float(value) for value in page.column("factors-0", "searched")]
    assert found == pytest.approx(file["regimes"][0]["lambdas"], abs=1e-4)
    assert {float(value) for value in page.column("factors-0", "PI")} == {4.0}
    assert float(page.column("factors-0", "NTK-aware")[-1]) == pytest.approx(4.0)


def test_methods_are_those_of_the_result(finished: Path, longrope_in: Longrope, page: Page) -> None:
    record = json.loads(longrope_in(finished, "studies", "show", "s", "--json").out)
    scores = record["result"]["scores"]["test"]
    own = dict(zip(page.column("methods-0", "method"), page.column("methods-0", "test, own attention"), strict=True))
    assert float(own["searched"]) == pytest.approx(
        math.exp(scores["searched"]["nll"] / scores["searched"]["tokens"]), abs=1e-4
    )
    assert len(own) == sum(not name.endswith("@study") for name in scores)


def test_counts_add_up_to_the_stores(finished: Path, page: Page) -> None:
    rows = Repository(f"sqlite:///{finished / 'longrope.db'}").generations("s")
    ranked = [row for row in rows if row.part in ("search", "refined")]
    assert sum(map(int, page.column("spread-0", "candidates"))) == len(ranked)
    assert sum(map(int, page.column("spread-0", "raced out"))) == sum(row.dropped for row in ranked) > 0
    assert sum(map(int, page.column("n-hat-0", "candidates"))) == sum(row.scored > 0 for row in ranked)
    (worker,) = page.column("workers", "worker")
    assert worker == "local"
    computed = int(page.column("workers", "forwards")[0]) + int(page.column("workers", "gradient steps")[0])
    with closing(sqlite3.connect(finished / "longrope.db")) as connection:
        (units,) = connection.execute(
            "select count(distinct key) from longrope_units where key in (select key from longrope_evaluations)"
        ).fetchone()
    assert computed == units == sum(int(value) for value in page.column("time", "evaluations") if value != "-")


def test_the_command_on_the_page_makes_the_same_bytes(
    finished: Path, longrope_in: Longrope, page: Page, tmp_path: Path
) -> None:
    name, *arguments = shlex.split(page.blocks[0])
    assert name == "longrope"
    ended = longrope_in(tmp_path, *arguments)
    assert ended.status == 0, ended.err
    assert (tmp_path / "s-factors.json").read_bytes() == (finished / "s-factors.json").read_bytes()


def test_a_study_that_was_stopped_shows_what_there_is(
    small_study: list[str],
    longrope: Longrope,
    tmp_path: Path,
    stop_after: Callable[[pytest.MonkeyPatch, int], None],
) -> None:
    seen = []
    for evaluations in (0, 1, 6, 40):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, evaluations)
            begun = longrope("resume", "s") if seen else longrope("launch", *small_study, "--study=s")
        assert begun.status == 130
        assert longrope("report", "s", "--out=now.html").status == 0
        found = Page.read(tmp_path / "now.html")
        assert "stopped" in found.text
        assert "what there is so far" in found.text
        assert_inert(found)
        seen.append(found.figures)
    assert seen[0] == []
    assert {"time", "workers"} <= {*seen[1]}
    assert {"convergence-0", "factors-0", "spread-0", "n-hat-0"} <= {*seen[3]}
    assert "methods-0" not in seen[3]


def test_hostile_names_are_text(
    small_study: list[str], tiny_llama_folder: Path, longrope: Longrope, tmp_path: Path, text_folder: Path
) -> None:
    model = tmp_path / SCRIPT.replace("/", "\N{FRACTION SLASH}")
    shutil.copytree(tiny_llama_folder, model)
    text = tmp_path / "</title><svg onload=alert(1)>".replace("/", "\N{FRACTION SLASH}")
    shutil.copytree(text_folder, text)
    options = [word for word in small_study if not word.startswith(("--model", "--data"))]
    assert longrope("launch", f"--model={model}", f"--data={text}", *options, "--study=s").status == 0
    with closing(sqlite3.connect(tmp_path / "longrope.db")) as connection, connection:
        connection.execute("update longrope_studies set name = ?", (f"../{SCRIPT}\x1b[31m\u202e",))
        connection.execute("update longrope_candidates set origin = ?", (f"{SCRIPT}</svg>",))
        connection.execute("update longrope_evaluations set worker = ?", (f"{SCRIPT}-->",))
        connection.execute(
            "update longrope_units set document_name = ?, failure = ? where position = 0 and rowid % 7 = 0",
            (f"{SCRIPT}]]>", f"{SCRIPT}</table>"),
        )
    ended = longrope("report", f"../{SCRIPT}\x1b[31m\u202e", "--json")
    assert ended.status == 0, ended.err
    written = Path(json.loads(ended.out)["written"])
    assert written.parent == Path()  # a name cannot lead out of the folder
    found = Page.read(tmp_path / written)
    assert_inert(found)
    assert found.text.count(SCRIPT) > 5
    assert "\\x1b[31m\\u202e" in found.text
    assert "\x1b" not in found.text
    assert found.figures == SEARCH_FIGURES


class TestEvaluationFiles:
    def file(self, folder: Path, value: object) -> Path:
        path = folder / "evaluation.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    def test_measures_become_figures(self, finished: Path, longrope_in: Longrope, tmp_path: Path) -> None:
        depth = {"depth": 0.5, "trials": 4, "right": 3, "chance": 0.1}
        whole = {"depth": None, "trials": 4, "right": 3}
        window = {"method": "yarn", "length": 64, "attention": "own", "failure": None}
        window |= {"single": {"perplexity": 7.5}, "sliding": {"perplexity": 6.5}}
        window["positions"] = [{"start": 1, "end": 8, "nll": 7 * math.log(5.0), "tokens": 7}]
        under_su = {**window, "attention": "su", "single": {"perplexity": 99.0}}
        found = {
            "model": "m",
            "lengths": [64, 128],
            "perplexity": {"yarn": {"128": 8.5}, SCRIPT: {"64": 9.0, "128": None}},
            "sliding": [window, under_su],
            "passkey": {"yarn": {"64": {"by_depth": [depth, whole], "k_max": 64}}},
        }
        path = self.file(tmp_path, found)
        target = tmp_path / "page.html"
        ended = longrope_in(finished, "report", "s", f"--evaluation={path}", f"--out={target}")
        assert ended.status == 0, ended.err
        page = Page.read(target)
        assert page.figures[6:10] == ["length-1", "sliding-1", "position-1-64", "passkey-1"]
        assert page.tables["length-1"] == [
            ["method", "64", "128"],
            ["YaRN", "7.5000", "8.5000"],
            [SCRIPT, "9.0000", "-"],
        ]
        assert page.column("position-1-64", "1-7") == ["5.0000"]
        assert page.column("passkey-1", "64") == ["3/4"]

    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            ("", "not valid JSON"),
            ("[" * 100_000, "nested too deeply"),
            ([1], "the file: expected an object, found a list of 1"),
            ({"lengths": [1]}, "model: this field is missing"),
            ({"model": "m", "lengths": [1], "perplexity": 3}, "perplexity: expected an object, found 3"),
            ({"model": "m", "lengths": [], "perplexity": {"pi": {"8x": 1.0}}}, "expected lengths in tokens as keys"),
            (
                {"model": "m", "lengths": [], "perplexity": {"pi": {"8": -1.0}}},
                "perplexity.pi.8: expected a finite number",
            ),
            (
                {"model": "m", "lengths": [], "perplexity": {"pi": {"8": 1.75e308}}},
                "perplexity.pi.8: expected a perplexity of at most 1e+300, found 1.75e+308",
            ),
            (
                {
                    "model": "m",
                    "lengths": [],
                    "sliding": [{"method": "pi", "length": 8, "attention": "own", "sliding": {"perplexity": 1.1e300}}],
                },
                "sliding[0].sliding: expected a perplexity of at most 1e+300",
            ),
            ('{"model": "m", "lengths": [], "perplexity": {"pi": {"8": NaN}}}', "perplexity.pi.8: expected a finite"),
            (
                {"model": "m", "lengths": [], "perplexity": {"pi": {"9" * 400: 1.0}}},
                "expected lengths in tokens as keys",
            ),
            ({"model": "m", "lengths": [], "sliding": ["x"]}, "sliding[0]: expected an object"),
            (
                {"model": "m", "lengths": [], "passkey": {"pi": {"8": {"by_depth": 1}}}},
                "by_depth: expected a list, found 1",
            ),
            (
                {
                    "model": "m",
                    "lengths": [],
                    "passkey": {"pi": {"8": {"by_depth": [{"depth": 0, "trials": 1, "right": 2}]}}},
                },
                "expected at most 1 right of 1, found 2",
            ),
        ],
    )
    def test_what_is_none_is_refused(
        self, value: object, complaint: str, finished: Path, longrope_in: Longrope, tmp_path: Path
    ) -> None:
        path = self.file(tmp_path, value)
        ended = longrope_in(finished, "report", "s", f"--evaluation={path}", f"--out={tmp_path / 'page.html'}")
        assert ended.status == 1
        assert ended.err.startswith("Error: ")
        assert ended.err.count("\n") == 1
        assert complaint in ended.err
        assert not (tmp_path / "page.html").exists()


def test_errors_are_one_line(finished: Path, longrope_in: Longrope, tmp_path: Path) -> None:
    for arguments, complaint in (
        (["report", "t"], "There is no study 't'"),
        (["report", "s", f"--out={tmp_path / 'none' / 'x.html'}"], "cannot be written"),
        (["report", "s", "--storage=sqlite:///none.db"], "There is no store"),
        (["report", "s", "--evaluation=none.json"], "none.json cannot be read"),
    ):
        ended = longrope_in(finished, *arguments)
        assert (ended.status, ended.err.count("\n")) == (1, 1)
        assert complaint in ended.err
