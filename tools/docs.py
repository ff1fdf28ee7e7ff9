"""Write the generated pages of docs/ again: commands, the site contract, the table of families, docs/reference/.

    python tools/docs.py [--check | --measure]

The table of families is measured, which takes minutes: only with --measure. With --check nothing is written; exit code
1 says that a page is out of date.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def commands() -> str:
    """Every command with its options, from the command line's own help."""
    from cutaway.cli.main import app

    text = app.generate_docs(output_format="markdown", recursive=True, include_hidden=False, heading_level=1)
    return text.replace("# cutaway\n", "# The command line\n", 1)


def sites() -> str:
    """The site contract as a table."""
    from cutaway.model.sites import KINDS

    lines = [
        "# Sites",
        "",
        "The tensors that can be read and edited, in the order of a forward pass. `{l}` is a layer;",
        "`blocks.*.resid_post` and `blocks.{3..7}.resid_post` name several. `cutaway sites MODEL` prints which of them",
        "a model has, and why one is absent.",
        "",
        "Dimensions: b batch, p position, d model width, H heads, KV key-value heads, h head width, q and k",
        "destination and source position, m MLP width, V vocabulary.",
        "",
        "| site | dimensions | meaning |",
        "|---|---|---|",
        *(f"| `{kind.name}` | {kind.dims} | {kind.meaning} |" for kind in KINDS.values()),
    ]
    return "\n".join(lines) + "\n"


def from_transformerlens() -> str:
    """The page as it is, with its table of names between the two marks made again."""
    from cutaway.model.aliases import ALIASES
    from cutaway.model.sites import KINDS

    spellings: dict[str, list[str]] = {}
    for theirs, ours in ALIASES.items():
        for name in ours:
            spellings.setdefault(name, []).append(f"`{theirs}`")
    assert set(spellings) <= set(KINDS)
    rows = [f"| `{name}` | {', '.join(spellings[name])} |" for name in KINDS if name in spellings]
    start, end = "<!-- names: make docs -->", "<!-- end -->"
    page = (DOCS / "from-transformerlens.md").read_text()
    before, after = page.split(start)[0], page.split(end)[1]
    return "\n".join([f"{before}{start}", "| cutaway | TransformerLens |", "|---|---|", *rows, f"{end}{after}"])


def first_session() -> str:
    """The first session, typed and run."""
    sys.path.insert(0, str(ROOT / "tools"))
    import first_session as session

    with tempfile.TemporaryDirectory() as folder:
        return session.page(Path(folder))


def parity() -> str:
    """The table of families, measured."""
    sys.path.insert(0, str(ROOT / "tools"))
    import families_page

    return families_page.page()


PAGES = {
    "commands.md": commands,
    "sites.md": sites,
    "from-transformerlens.md": from_transformerlens,
    "parity.md": parity,
    "first-session.md": first_session,
}
REFERENCE = "reference"
"""The folder of the pages that are made of docstrings (tools/reference.py)."""
MEASURED = ("parity.md", "first-session.md")
"""Their numbers differ in the last digit between machines: tests hold them to tolerances."""


def main(arguments: list[str]) -> int:
    """Write each page, or compare it with what is there."""
    outdated = 0
    sys.path.insert(0, str(ROOT / "tools"))
    import reference

    made = {f"{REFERENCE}/{name}": text for name, text in reference.pages().items()}
    stale = [path for path in (DOCS / REFERENCE).glob("*.md") if f"{REFERENCE}/{path.name}" not in made]
    for path in stale:
        print(f"docs/{REFERENCE}/{path.name} is of no package that hands names on")
        outdated += 1
        if "--check" not in arguments:
            path.unlink()
    (DOCS / REFERENCE).mkdir(exist_ok=True)
    pages = {**PAGES, **{name: partial(str, text) for name, text in made.items()}}
    for name, make in pages.items():
        if name in MEASURED and "--measure" not in arguments:
            continue
        path, text = DOCS / name, make().rstrip() + "\n"
        if path.is_file() and path.read_text() == text:
            continue
        if "--check" in arguments:
            print(f"docs/{name} is out of date: make docs")
            outdated += 1
        else:
            path.write_text(text)
            print(f"docs/{name} written")
    return 1 if outdated and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
