"""What every result must be able to do."""

import json
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet

from cutaway.artifacts.files import plain
from cutaway.draw.result import SUFFIXES, Result


def check_result(result: Result, folder: Path) -> Path:
    """It prints itself in a few lines, is a table and plain JSON, draws itself, and is saved as each kind of file.

    Returns the folder that holds the files, result.json and so on.
    """
    folder = folder / f"{type(result).__name__} {len(list(folder.iterdir()))}"
    folder.mkdir()
    lines = repr(result).splitlines()
    assert 0 < len(lines) <= 12, repr(result)
    assert all(len(line) < 400 for line in lines)
    assert result.title
    rows = result.rows()
    assert len(result.to_frame()) == len(rows) > 0
    assert all(list(row) == list(rows[0]) for row in rows)
    assert "&lt;svg" in result._repr_html_()
    for suffix in SUFFIXES:
        path = result.save(folder / f"result{suffix}")
        assert path.stat().st_size > 0
        result.save(path)  # its own file is replaced
    saved = json.loads((folder / "result.json").read_text())
    assert saved == json.loads(json.dumps(plain(result._whole())))
    assert pyarrow.parquet.read_table(folder / "result.parquet").num_rows == len(rows)
    assert pyarrow.csv.read_csv(folder / "result.csv").column_names == list(rows[0])
    assert (folder / "result.svg").read_text().startswith("<svg ")
    return folder
