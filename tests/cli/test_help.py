"""Help and what is said of a wrong word, for every command."""

import pytest

from cutaway.cli.main import app, main
from cutaway.cli.output import print_table


@pytest.mark.parametrize("path", [[], ["dictionary"], ["subjects"]])
def test_an_unknown_command_lists_all_of_them(path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "bogus"]) == 2
    said = capsys.readouterr().err
    group = app[path[0]] if path else app
    known = [name for name in group if not name.startswith("-") and group[name].show]
    assert said == f'cutaway: Unknown command "bogus". Commands: {", ".join(known)}. (see cutaway --help)\n'
    assert len(known) > 2


def test_no_option_has_an_empty_or_negative_form(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["dictionary"], ["subjects"]):
        group = app[words[0]] if words else app
        for name in group:
            if name.startswith("-"):
                continue
            assert main([*words, name, "--help"]) == 0
            text = capsys.readouterr().out
            assert "--empty-" not in text
            assert "--no-" not in text.replace("--no-header", "").replace("--no-browser", "")


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from cutaway.dictionaries.training.presets import PRESETS

    assert main(["dictionary", "presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(PRESETS)


def test_a_table_is_wrapped_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    said = "word " * 40
    print_table(["name", "meaning"], [["one", said]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines[2:]).split() == ["one", *said.split()]


def test_completion_knows_commands_and_options() -> None:
    script = app.generate_completion(shell="bash")
    assert all(word in script for word in ("attribute", "dictionary", "--document-separator"))
