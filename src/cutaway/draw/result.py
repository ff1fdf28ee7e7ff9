"""What every result can do: print itself in a few lines, be JSON, a table, a drawing, and a file of any of these."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from markupsafe import Markup

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import BadFile, CutawayError, MissingExtra
from cutaway.artifacts.files import atomic_path, plain, read_json, refuse_replacing, write_json, write_text
from cutaway.draw.page import page_html, write_page
from cutaway.draw.style import script, stylesheet

if TYPE_CHECKING:
    import pandas
    import pyarrow

T = TypeVar("T")

_DRAWING_MARK = "cutaway's drawings"
"""In the stylesheet of every drawing."""
SUFFIXES = (".json", ".html", ".svg", ".csv", ".parquet")


class Result(ABC):
    """The base of every result. A subclass says what it holds; printing, tables and files follow.

    A subclass is a dataclass with `repr=False`, so that `__repr__` is this one.
    """

    title: ClassVar[str] = ""
    """What the result is, in a heading: "Logit lens"."""

    @abstractmethod
    def summary(self) -> str:
        """A few lines of plain text: what was measured, on what, and the figures that matter (at most 12 lines)."""

    @abstractmethod
    def to_json(self) -> Any:
        """The whole result as plain data, such as `json.dumps` takes."""

    @abstractmethod
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One flat mapping per figure, all with the same keys: what a table of the result holds."""

    @abstractmethod
    def drawing(self) -> Markup:
        """The drawing that the command makes of it: HTML with SVG inside, without a page around it."""

    def _whole(self) -> Any:
        """What a .json file holds: `to_json()`, with nothing left out where that shows a part by default."""
        return self.to_json()

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        # a frame of its own: a notebook's styles and these do not meet
        page = f"<!doctype html><style>{stylesheet()}</style>{self.drawing()}<script>{script()}</script>"
        return (
            f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts" style="width:100%;border:0" height="480"'
            f' title="{escape(self.title)}"></iframe>'
        )

    def to_frame(self) -> pandas.DataFrame:
        """`rows()` as a pandas DataFrame. Raises `MissingExtra` where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("to_frame() needs pandas: pip install 'cutaway[pandas]'") from error
        return pandas.DataFrame([dict(row) for row in self.rows()])

    def save(self, path: str | Path) -> Path:
        """Write the result as what the path's suffix names.

        Args:
            path: .json is `to_json()`, .csv and .parquet are `rows()`, .svg is the drawing's (first) picture, .html a
                page that needs no network.

        Returns:
            The path.

        Raises:
            BadFile: Another suffix, or a file is there that is no such result.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".json":
            content = plain(self._whole())
            _refuse_other_json(path, content)
            write_json(path, content)
        elif suffix == ".html":
            model = getattr(self, "model", None)
            page = page_html(
                title=f"{self.title} · {model}" if isinstance(model, str) else self.title,
                sections=[("", "", self.drawing())],
                lead=self.summary(),
                command=current_command(),
            )
            write_page(path, page)
        elif suffix == ".svg":
            refuse_replacing(path, "drawing", _DRAWING_MARK)
            write_text(path, _svg_of(self.drawing(), self.title))
        elif suffix in (".csv", ".parquet"):
            _write_table(path, _table(self.rows()))
        else:
            raise BadFile(f"{path.name}: a result is saved as one of {', '.join(SUFFIXES)}")
        return path


class ResultSequence(Result, Sequence[T]):
    """A result that is a sequence of its parts."""

    @abstractmethod
    def _items(self) -> tuple[T, ...]:
        """The parts."""

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[T]:
        return iter(self._items())

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        return self._items()[index]


def _svg_of(drawing: str, title: str) -> str:
    """The first SVG element of a drawing as a file of its own, with the stylesheet inside. `BadFile` if it has none."""
    drawing = str(drawing)  # plain text: Markup would escape what is added
    start = drawing.find("<svg")
    end = drawing.find("</svg>", start)
    if start < 0 or end < 0:
        raise BadFile(f"the drawing of “{title}” is no SVG: save it as .html")
    picture = drawing[start : end + len("</svg>")]
    head, rest = picture.split(">", 1)
    if "xmlns=" not in head:
        head += ' xmlns="http://www.w3.org/2000/svg"'
    return f"{head}><style>{stylesheet()}</style>{rest}\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    import pyarrow

    if not rows:
        raise BadFile("the result has no rows, so there is no table to save")
    return pyarrow.Table.from_pylist([dict(row) for row in rows])


def _write_table(path: Path, table: pyarrow.Table) -> None:
    if os.path.isfile(path) and _columns(path) != table.column_names:
        raise BadFile(f"{path} exists and is no table with these columns; name another file, or move it")
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".csv":
            from pyarrow import csv

            csv.write_csv(table, temporary)
        else:
            from pyarrow import parquet

            parquet.write_table(table, temporary)


def _columns(path: Path) -> list[str] | None:
    """The columns of the table at `path`, None where it is no such table."""
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if path.suffix.lower() == ".csv":
            return csv.open_csv(path).schema.names
        return parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException):
        return None


def _refuse_other_json(path: Path, content: Any) -> None:
    """Raise `BadFile` where `path` is a file that is not of the same shape: it may be somebody's input."""
    if not os.path.isfile(path):
        return
    try:
        found = read_json(path)
    except CutawayError:
        found = None
    if _shape(found) != _shape(content):
        raise BadFile(f"{path} exists and is no such result; name another file, or move it")


def _shape(content: Any) -> Any:
    """What tells one kind of JSON from another: the names at its top, or those of a list's first entry."""
    if isinstance(content, dict):
        return sorted(content)
    return [_shape(content[0])] if isinstance(content, list) and content else type(content).__name__
