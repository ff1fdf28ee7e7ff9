"""Documents one after another, from wherever they are, without ever holding all of them.

    for text in documents_of("texts/"): ...

A path is a text file or a folder of them (`corpus.SUFFIXES`, and Parquet); `hub:NAME` is a data set that the library
`datasets` loads; any iterable of texts, or of records with a text, will do, and a function that returns one.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import BadFile, CutawayError, MissingExtra
from cutaway.artifacts.files import has_lone_surrogate, parquet_errors, parse_json, read_errors
from cutaway.data.corpus.separators import check_separator, separated

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
_HUB = "hub:"
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
_PIECE = 1 << 18


@dataclass(frozen=True)
class Documents:
    """A stream of texts that can be begun again; iterate over it. Make one with `documents_of`."""

    begin: Callable[[], Iterator[str]]
    """Begins the stream anew."""
    source: str
    """Its name for people."""
    fingerprint: str | None
    """Changes when the source does; None where nothing cheap tells."""
    size: int | None
    """What there is to read in bytes, as far as it is known."""
    separator: str | None = None
    """Where texts were cut into documents, if at a separator."""

    def __iter__(self) -> Iterator[str]:
        return self.begin()


TextSource = (
    str | Path | Documents | Iterable[str | Mapping[str, Any]] | Callable[[], Iterable[str | Mapping[str, Any]]]
)
"""Where texts come from: a path, `hub:NAME`, an iterable of texts or records, or a function that returns one."""


def documents_of(
    corpus: TextSource, *, field: str = "text", split: str = "train", document_separator: str | None = None
) -> Documents:
    """The documents of a corpus one after another, without ever holding all of them.

    Args:
        corpus: A path of a file or folder, `hub:NAME` (or `hub:NAME:CONFIGURATION`), an iterable of texts or records,
            or a function that returns one. An iterator that can be gone through only once is taken as it is.
        field: Where a record keeps its text.
        split: What is taken of a data set that has several.
        document_separator: Where every text is cut, such as "<|endoftext|>" (wherever it is) or "---" (alone on a
            line): a .txt file there instead of at blank lines, other files, records and texts into several.

    Returns:
        The stream.

    Raises:
        CutawayError: A corpus that is none of these, a path that is not there, a text that cannot be read.

    Example:
        >>> list(documents_of(["one<|endoftext|>two"], document_separator="<|endoftext|>"))
        ['one', 'two']
    """
    check_separator(document_separator)
    if document_separator is not None:
        return _separated(corpus, field, split, document_separator)
    if isinstance(corpus, Documents):
        return corpus
    if isinstance(corpus, str) and corpus.startswith(_HUB):
        corpus, name = _load_dataset(corpus.removeprefix(_HUB), split), corpus
    elif isinstance(corpus, (str, Path)):
        return _of_path(Path(corpus), field)
    else:
        name = type(corpus).__name__
    if isinstance(corpus, Mapping):  # a DatasetDict
        if split not in corpus:
            raise CutawayError(f"{name} has no split '{split}'; it has {', '.join(map(str, corpus))}")
        corpus = corpus[split]
    fingerprint = getattr(corpus, "_fingerprint", None)
    if isinstance(corpus, (list, tuple)) and all(isinstance(text, str) for text in corpus):
        fingerprint = _hash_texts(map(str, corpus))
    if not isinstance(corpus, Iterable) and not callable(corpus):
        raise CutawayError(
            f"A corpus is a path, hub:NAME, rows of token ids, or texts in any iterable; not a {type(corpus).__name__}."
        )
    make: Any = corpus if callable(corpus) and not isinstance(corpus, Iterable) else lambda: corpus
    spent = False

    def begin() -> Iterator[str]:
        nonlocal spent
        if spent:
            raise CutawayError(
                f"The {name} of texts can be read only once, and is needed twice; give a list, or a function that "
                "returns it anew."
            )
        spent = isinstance(corpus, Iterator)
        for number, item in enumerate(make()):
            text = item.get(field) if isinstance(item, Mapping) else item
            if not isinstance(text, str):
                what = f"a record with no text in '{field}'" if isinstance(item, Mapping) else type(item).__name__
                raise CutawayError(f"Document {number} of {name} is {what}; a document is a text.")
            yield text

    return Documents(begin, name, None if fingerprint is None else str(fingerprint), None)


def _separated(corpus: TextSource, field: str, split: str, separator: str) -> Documents:
    """The same documents, cut where a separator stands; of a file not a paragraph at a time, but the whole."""
    texts: Callable[[], Iterator[Iterable[str]]]
    if isinstance(corpus, (str, Path)) and not str(corpus).startswith(_HUB):
        plain = _of_path(Path(corpus), field)
        files = _corpus_files(Path(corpus))

        def texts() -> Iterator[Iterable[str]]:
            return (text for file in files for text in _whole_texts(file, field))
    else:
        plain = documents_of(corpus, field=field, split=split)

        def texts() -> Iterator[Iterable[str]]:
            return ([text] for text in plain)

    def begin() -> Iterator[str]:
        return separated(texts(), separator, plain.source)

    return Documents(begin, plain.source, plain.fingerprint, plain.size, separator)


def _whole_texts(file: Path, field: str) -> Iterator[Iterable[str]]:
    """The texts of a file before they are cut, each in pieces: records, or the whole file."""
    if file.suffix in (".parquet", ".jsonl"):
        yield from ([text] for text in file_documents(file, field))
    else:
        yield _decoded(file)


def _hash_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        add_document(digest, text)
    return digest.hexdigest()


def add_document(digest: Any, text: str) -> None:
    """Add one document, and where it ends, to a running hash of a corpus."""
    data = text.encode(errors="surrogatepass")
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _load_dataset(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            f"Reading '{_HUB}{name}' takes the library datasets, which is not installed: "
            "pip install 'cutaway[datasets]'"
        ) from error
    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None, split=split, streaming=True)
    except Exception as error:  # the library and the hub client raise many kinds
        said = " ".join(str(error).split())[:200]
        raise CutawayError(f"The data set '{name}' cannot be loaded: {said or type(error).__name__}") from error


def _of_path(path: Path, field: str) -> Documents:
    files = _corpus_files(path)
    sizes = [(str(file.relative_to(path)) if file != path else file.name, file.stat().st_size) for file in files]
    fingerprint = hashlib.sha256(json.dumps(sizes).encode(errors="surrogatepass")).hexdigest()

    def begin() -> Iterator[str]:
        empty = True
        for file in files:
            for text in file_documents(file, field):
                empty = False
                yield text
        if empty:
            raise BadFile(f"{path} holds no text: an empty corpus cannot be used")

    known = all(file.suffix != ".parquet" for file in files)  # which is compressed
    return Documents(begin, str(path), fingerprint, sum(size for _, size in sizes) if known else None)


def _corpus_files(path: Path) -> list[Path]:
    """The file, or every file of `SUFFIXES` below a folder in the order of their paths, hidden ones left out."""
    with read_errors(path):
        folder, there = path.is_dir(), path.exists()
        files = sorted(file for file in _below(path) if file.suffix in SUFFIXES and file.is_file()) if folder else []
    if folder:
        if not files:
            raise BadFile(f"{path} holds no {', '.join(SUFFIXES)} file: name a folder of texts, or one text file")
        return files
    if there:
        return [path]
    raise BadFile(f"{path} does not exist: name a text file or a folder of text files")


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder that are not hidden. Raises `OSError` for a folder that may not be looked into."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def file_documents(file: Path, field: str = "text") -> Iterator[str]:
    """The documents of one file: paragraphs of a .txt, records of a .jsonl or .parquet, else the whole file.

    Only the whole file of the last kind is ever in memory at once.
    """
    with read_errors(file):
        if file.suffix == ".parquet":
            yield from _parquet(file, field)
        elif file.suffix == ".jsonl":
            yield from _json_lines(file, field)
        elif file.suffix == ".txt":
            yield from (piece.strip("\n") for piece in _paragraphs(_decoded(file)) if piece.strip())
        else:
            text = "".join(_decoded(file))
            if text.strip():
                yield text


def _not_utf8(file: Path, place: int, byte: int) -> CutawayError:
    return CutawayError(
        f"{file} is not UTF-8: byte {place} is 0x{byte:02x}; save it as UTF-8, for example with "
        "`iconv -f WINDOWS-1252 -t UTF-8`, or leave it out"
    )


def _decoded(file: Path) -> Iterator[str]:
    """The text of a file piece by piece, a byte order mark at its start left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0  # of the first byte that is not decoded yet
    first = True
    with open(file, "rb") as stream:
        while True:
            data = stream.read(_PIECE)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, place - held + error.start, error.object[error.start]) from error
            place += len(data)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            yield text
            if not data:
                return


def _paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    """Text cut where lines are blank, as `re.split` with `_BLANK_LINES` cuts the whole."""
    held, tail, after_blank = "", "", False
    for piece in pieces:
        new = tail + piece
        tail = "\r" if new.endswith("\r") else ""  # of a "\r\n" perhaps
        held += new.removesuffix("\r").replace("\r\n", "\n")
        if after_blank:
            held = held.lstrip()
        *whole, held = _BLANK_LINES.split(held)
        yield from whole
        after_blank = (bool(whole) or after_blank) and not held
    yield held + tail


def _json_lines(file: Path, field: str) -> Iterator[str]:
    place = 0
    with open(file, "rb") as stream:
        for number, data in enumerate(stream, start=1):
            data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
            try:
                line = data.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(file, place + error.start, data[error.start]) from error
            place += len(data)
            if not line.strip():
                continue
            record = parse_json(line, f"{file}, line {number},")
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise BadFile(f'{file}, line {number}, is not an object with a "{field}"')
            if has_lone_surrogate(record[field]):
                raise BadFile(f"{file}, line {number}, holds half of a surrogate pair, which no UTF-8 text can")
            yield record[field]


def _parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with parquet_errors(file), pyarrow.parquet.ParquetFile(file) as table:
        if field not in table.schema_arrow.names:
            raise BadFile(f"{file} has no column '{field}'; it has {', '.join(table.schema_arrow.names) or 'none'}")
        if not pyarrow.types.is_string(kind := table.schema_arrow.field(field).type) and not (
            pyarrow.types.is_large_string(kind)
        ):
            raise BadFile(f"The column '{field}' of {file} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            texts = [text for text in batch.column(0).to_pylist() if text is not None]
            yield from texts
