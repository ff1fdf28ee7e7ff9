"""Text for looking into atlas: a stream of its world that no training has seen, and held-out library source."""

import json
import random
from pathlib import Path

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import atomic_path, make_folder
from cutaway.data.corpus.python_library import standard_library
from cutaway.subjects.world.corpus import PARTS, documents
from cutaway.subjects.world.held_out import held_out_document


def world_text(characters: int, stream: str) -> list[str]:
    """Documents of every part of the world, by the parts' shares of it.

    Args:
        characters: About how many characters in all.
        stream: The seed of the draw, any text: another one gives other documents, which no training has seen.

    Example:
        >>> len(world_text(10_000, "mine")) > 20
        True
    """
    return [text for part, about in PARTS.items() for text in documents(part, stream, int(about.share * characters))]


def library_text() -> list[str]:
    """Source of the running Python's library that training leaves out."""
    return [document.text for document in standard_library() if held_out_document(document.name)]


def write_text(out: Path, characters: int, seed: int) -> int:
    """Write both as JSON lines ({"text": ...}), shuffled, whole or not at all; returns the number of documents.

    Raises `CutawayError` when the file exists.
    """
    if out.exists():
        raise CutawayError(f"{out} exists: name another file, or remove it")
    texts = [*world_text(characters, f"text-{seed}"), *library_text()]
    random.Random(seed).shuffle(texts)
    make_folder(out.parent)
    with atomic_path(out) as path, path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return len(texts)
