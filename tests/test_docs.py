"""The pages' Python examples run as they stand, and the pages that are linked to exist."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str) -> list[tuple[int, str, str]]:
    """(first line, what stands behind the backticks, code) of each fenced block."""
    return [(text[: m.start(2)].count("\n") + 1, m[1].strip(), m[2]) for m in _FENCE.finditer(text)]


def examples(page: Path) -> str:
    """A page's `python` blocks as one program whose line numbers are the page's; `python no-run` is left out."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for first, info, code in blocks(text):
        if info == "python":
            lines[first - 1 : first - 1 + code.count("\n")] = code.splitlines()
    return "\n".join(lines)


def _name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p).strip()], ids=_name)
def test_a_pages_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks share one namespace, in an empty folder, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    exec(compile(examples(page), _name(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_python_block_parses(page: Path) -> None:
    for first, info, code in blocks(page.read_text(encoding="utf-8")):
        assert info in ("python", "python no-run", "pyi", "sh", "console", ""), f"line {first}: ```{info}"
        if info.startswith("python"):
            compile(code, f"{_name(page)}, line {first}", "exec")


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"], ids=_name)
def test_linked_files_exist(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if not target.startswith(("http://", "https://", "mailto:", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{_name(page)} links to {target}"


def test_the_readme_leads_to_every_page() -> None:
    """A page that no other links to is not found."""
    linked = {
        (page.parent / target.split("#")[0]).resolve()
        for page in [*PAGES, REPOSITORY / "CONTRIBUTING.md"]
        for target in [
            *_LINK.findall(page.read_text(encoding="utf-8")),
            *re.findall(r"`(docs/\w+\.md)`", page.read_text()),
        ]
        if not target.startswith(("http", "#"))
    }
    assert {page.name for page in PAGES if page.resolve() not in linked} <= {"README.md"}


def test_examples_are_found_and_numbered(tmp_path: Path) -> None:
    """The finder itself: a block's code keeps its line, and what is not to be run is left out."""
    kinds = {"python": "a = 1", "python no-run": "b = nothing", "sh": "ls"}
    text = (
        "# Page\n"
        + "".join(f"\n```{kind}\n{code}\n```\n" for kind, code in kinds.items())
        + "\n```python\nc = a\n```\n"
    )
    assert [(first, info) for first, info, _ in blocks(text)] == [
        (4, "python"),
        (8, "python no-run"),
        (12, "sh"),
        (16, "python"),
    ]
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    assert [(i + 1, line) for i, line in enumerate(examples(tmp_path / "page.md").split("\n")) if line] == [
        (4, "a = 1"),
        (16, "c = a"),
    ]
