"""The first session of docs/first-session.md: typed by completion alone, and run.

Each step names what is typed after the completions that lead there; Python's own completer must offer them.
"""

import ast
import contextlib
import io
import os
import re
import rlcompleter
from pathlib import Path
from typing import Any

PAGE = "first-session.md"
WIDTH = 100
STEPS: list[tuple[str, str]] = [
    # (what is completed first: the prefix before Tab, "" for none; the line that is then entered)
    ("", "import cutaway"),
    ("cutaway.", 'lm = cutaway.load("atlas")'),
    ("lm.", 'lm.run("The capital of the state containing Dallas is")'),
    ("cutaway.data.", 'pairs = cutaway.data.readable_pairs(lm, cutaway.data.task("greater than"), 8)'),
    ("cutaway.causal.", "cutaway.causal.task_accuracy(lm, pairs)"),
    ("cutaway.causal.patch", 'grid = cutaway.causal.patch_grid(lm, pairs, over="heads", roles="last")'),
    ("", "grid"),
    ("grid.", 'grid.save("grid.svg")'),
]
INTRODUCTION = """# A first session

From `import cutaway` to a picture, finding everything with the Tab key. `tools/first_session.py` types it; a test
compares. Next: [what causes an answer](causal.md), or the [index by task](README.md).

"""


def offered(prefix: str, names: dict[str, Any]) -> list[str]:
    """What Python's completer offers after a prefix, without names that begin with an underscore."""
    completer, found = rlcompleter.Completer(names), []
    while (one := completer.complete(prefix, len(found))) is not None:
        found.append(one)
    return sorted({one.rsplit(".", 1)[-1].rstrip("()") for one in found})


def shown(names: list[str]) -> str:
    """Names in columns, as a terminal shows them."""
    wide = max(map(len, names)) + 2
    per_line = max(1, WIDTH // wide)
    lines = [names[i : i + per_line] for i in range(0, len(names), per_line)]
    return "\n".join("".join(f"{name:{wide}}" for name in line).rstrip() for line in lines)


def typed_names(line: str) -> set[str]:
    """Every attribute in a line: each must have been offered by some completion."""
    return {node.attr for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Attribute)}


def session(folder: Path) -> str:
    """Run the steps in a folder and return the transcript. Raises `LookupError` where completion lacks a name."""
    names: dict[str, Any] = {}
    out: list[str] = []
    seen: set[str] = set()
    before = Path.cwd()
    os.chdir(folder)
    try:
        for prefix, line in STEPS:
            if prefix:
                found = offered(prefix, names)
                seen |= set(found)
                out += [f">>> {prefix}<Tab>", shown(found)]
            missing = typed_names(line) - seen - set(dir(names.get("cutaway", object)))
            if missing:
                raise LookupError(f"completion does not offer {', '.join(sorted(missing))}, which {line!r} needs")
            out.append(f">>> {line}")
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(line, "<session>", "single"), names)
            if said.getvalue():
                out.append(said.getvalue().rstrip())
    finally:
        os.chdir(before)
    return "\n".join(out) + "\n"


def page(folder: Path) -> str:
    """The page as it should be."""
    return f"{INTRODUCTION}```console\n{session(folder)}```\n"


def without_numbers(text: str) -> str:
    """A transcript with its decimals left out: they differ in the last digit from processor to processor."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d+\.\d+|\bn = \d+", "#", text))
