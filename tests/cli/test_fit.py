"""What commands print fits the terminal, and nothing is lost but what a sign says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutaway.cli.fit import fitted, say
from cutaway.cli.output import print_table

CHECKS = [("check", "layers", "worst", "allowed"), ("resid_pre + attn.out = resid_mid", "8", "0.0e+00", "1.0e-05")]
CHECKS += [("the effect of an edit at a site equals that of the same by hand", "8", "1.2e-07", "1.0e-05")]
TABLE = "\n".join(
    ["A self-test of a model with a name, and a sentence about it that is too long for a line of eighty characters."]
    + [f"{a:<66} {b:>6} {c:>9} {d:>9}" for a, b, c, d in CHECKS]
)
GRID = "\n".join(
    [" " * 6 + "".join(f"{f'·word{i}':>10}" for i in range(14))]
    + [f"  L{layer:<3} " + "".join(f"{layer + i / 100:>10.2f}" for i in range(14)) for layer in range(3)]
)
REASONS = "\n".join(
    f"{name:<14}  {'absent: ' + 'positions enter attention by a rotation of queries and keys ' * n}".rstrip()
    for n, name in enumerate(("site", "pos_embed", "blocks.0.attn"))
)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("text", [TABLE, GRID, REASONS])
def test_tables_fit_and_keep_every_word(text: str, width: int) -> None:
    shown = fitted(text, width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert set(shown.split()) == set(text.split())


def test_a_grid_goes_on_below_behind_its_first_column() -> None:
    first, second = fitted(GRID, 80).split("\n\n")
    assert first.splitlines()[1].split() == ["L0", *(f"{i / 100:.2f}" for i in range(7))]
    assert second.splitlines()[3].split() == ["L2", *(f"{2 + i / 100:.2f}" for i in range(7, 14))]


def test_a_column_of_words_goes_on_in_its_own_place() -> None:
    lines = fitted(REASONS, 80).splitlines()
    assert len(lines) == 5
    assert all(not line[:16].strip() for line in lines if not line.startswith(("site", "pos", "blocks")))
    checks = fitted(TABLE, 80).splitlines()[2:]
    assert {line[-9:] for line in checks if "e-" in line} == {"  1.0e-05"}


def test_what_fits_stays_as_it_is() -> None:
    assert fitted(TABLE, 120) == TABLE
    assert fitted(GRID, 200) == GRID


def test_long_words_are_shortened_with_a_sign_and_paths_stay_whole() -> None:
    path = "/a/" + "b" * 100
    assert fitted(f"page: {path}", 80).split() == ["page:", path]
    assert fitted("x" * 100, 80) == "x" * 79 + "…"


@given(st.text(st.sampled_from("ab  \n.…/é字"), max_size=400), st.integers(40, 130))
def test_any_text(text: str, width: int) -> None:
    shown = fitted(text, width)
    assert all(len(line) <= width or "/" in line for line in shown.split("\n"))
    pieces = set(text.split())
    for word in shown.split():
        assert word in pieces or word.endswith("…") or any(word in piece for piece in pieces)
    assert re.sub(r"\s", "", text) == "" or shown.strip()


def test_only_terminals_are_fitted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    say(GRID)
    assert capsys.readouterr().out == GRID + "\n"  # a pipe gets whole lines
    monkeypatch.setenv("COLUMNS", "80")
    say(GRID)
    assert capsys.readouterr().out == fitted(GRID, 80) + "\n"
    print_table(["preset", "what"], [["one", "a word " * 30], ["another", "short"]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "preset   what"
    assert lines[3].startswith("         word a")


def test_no_word_is_cut_where_its_column_can_stand_below() -> None:
    words = ["a long_name_of_a_thing", "b"]
    text = "\n".join(f"{f'row {n}':<30}  {'x' * 26:<26}  {cell:<30}  last" for n, cell in enumerate(words))
    assert "…" not in fitted(text, 80)
    assert set(fitted(text, 80).split()) == set(text.split())
