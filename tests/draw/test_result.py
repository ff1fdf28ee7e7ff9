"""What every result can do, on a small one."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
from html_check import Page
from markupsafe import Markup

from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import BadFile, CutawayError, MissingExtra
from cutaway.artifacts.results import Effect
from cutaway.draw.result import Result


@dataclass(frozen=True, repr=False)
class Weights(Result):
    values: tuple[float, ...]
    title = "Weights"

    def summary(self) -> str:
        return f"Weights of {len(self.values)} things, at most {max(self.values):g}"

    def to_json(self) -> dict[str, object]:
        return {"values": list(self.values)}

    def rows(self) -> list[dict[str, object]]:
        return [{"thing": i, "weight": value} for i, value in enumerate(self.values)]

    def drawing(self) -> Markup:
        return Markup('<div><svg viewBox="0 0 1 1"><rect width="1" height="1"></rect></svg></div>')


class Nothing(Weights):
    def rows(self) -> list[dict[str, object]]:
        return []


WEIGHTS = Weights((1.0, 2.5))


def test_it_prints_its_summary():
    assert repr(WEIGHTS) == "Weights of 2 things, at most 2.5"
    assert "srcdoc" in WEIGHTS._repr_html_()
    assert "&lt;svg" in WEIGHTS._repr_html_()


def test_files_hold_what_their_suffix_says(tmp_path: Path):
    for suffix in ("json", "csv", "parquet", "svg", "html"):
        with recording("cutaway weigh"):
            path = WEIGHTS.save(tmp_path / f"w.{suffix}")
        WEIGHTS.save(path)  # its own file is replaced
    assert json.loads((tmp_path / "w.json").read_text()) == {"values": [1.0, 2.5]}
    for table in (pyarrow.csv.read_csv(tmp_path / "w.csv"), pyarrow.parquet.read_table(tmp_path / "w.parquet")):
        assert table.to_pylist() == WEIGHTS.rows()
    assert (tmp_path / "w.svg").read_text().startswith("<svg ")
    assert 'xmlns="http://www.w3.org/2000/svg"' in (tmp_path / "w.svg").read_text()
    assert not Page((tmp_path / "w.html").read_text()).problems
    assert WEIGHTS.to_frame()["weight"].tolist() == [1.0, 2.5]


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet", "svg", "html"])
def test_a_stranger_s_file_stays(tmp_path: Path, suffix: str):
    path = tmp_path / f"mine.{suffix}"
    path.write_text("my notes")
    with pytest.raises(CutawayError, match="exists and is no"):
        WEIGHTS.save(path)
    assert path.read_text() == "my notes"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"model_type": "llama"}'),
        ("list.json", "[1, 2]"),
        ("logo.svg", "<svg viewBox='0 0 1 1'></svg>"),
        ("other.csv", '"thing","length"\n1,2\n'),
    ],
)
def test_a_stranger_s_file_of_the_same_kind_stays(tmp_path: Path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(CutawayError, match="exists and is no"):
        WEIGHTS.save(path)
    assert path.read_text() == text


def test_a_stranger_s_table_stays(tmp_path: Path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(BadFile, match="exists and is no table with these columns"):
        WEIGHTS.save(path)
    assert pyarrow.parquet.read_table(path).column_names == ["text"]


def test_what_json_has_no_word_for_is_null_and_no_rows_are_no_table(tmp_path: Path):
    path = Weights((float("nan"), 1.0)).save(tmp_path / "w.json")
    assert "NaN" not in path.read_text()
    with pytest.raises(BadFile, match="no rows"):
        Nothing((1.0,)).save(tmp_path / "w.csv")
    with pytest.raises(CutawayError):
        WEIGHTS.save(tmp_path / f"{'x' * 300}.json")


def test_another_suffix_and_a_missing_pandas_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BadFile, match=r"w.docx: a result is saved as one of \.json, \.html"):
        WEIGHTS.save(tmp_path / "w.docx")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cutaway\[pandas\]'"):
        WEIGHTS.to_frame()


def test_figures_name_the_command_that_runs():
    def made() -> str | None:
        return Effect("x", 1.0, 1, None, (), "none", "nats").command

    assert made() is None
    with recording("cutaway a"):
        assert made() == "cutaway a"
    assert made() is None
