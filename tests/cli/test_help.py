"""Help and what is said of a wrong word, for every command."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from cyclopts import App, Group

from cutaway.cli.help import ASKED, EXAMPLES, GROUPS, METHOD, OUTPUT, RUN
from cutaway.cli.main import app, main
from cutaway.cli.options import MetricName
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


def _commands(group: App = app, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], App]]:
    for name in group:
        if not name.startswith("-"):
            if group[name].default_command is None:
                yield from _commands(group[name], (*path, name))
            else:
                yield (*path, name), group[name]


def test_options_are_in_one_order_and_the_same_groups_everywhere() -> None:
    order = [name for group in (ASKED, RUN, OUTPUT) for name in GROUPS[group]]
    seen: dict[str, set[str]] = {}
    for path, command in _commands():
        options = [one for one in command.assemble_argument_collection() if one.name.startswith("--")]
        groups = [group for one in options for group in one.parameter.group or () if isinstance(group, Group)]  # type: ignore[union-attr]
        places = [(ASKED, METHOD, RUN, OUTPUT).index(group) for group in groups]
        assert places == sorted(places), path
        shared = [one.field_info.name for one, group in zip(options, groups, strict=True) if group is not METHOD]
        assert shared == sorted(shared, key=order.index), path
        for one, group in zip(options, groups, strict=True):
            seen.setdefault(one.field_info.name, set()).add(group.name)
    assert [name for name, places in seen.items() if len(places) > 1] == []
    assert seen["html"] == {"Output"}
    assert seen["draws"] == {"Run"}


def test_every_command_has_examples_that_its_parser_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.jsonl", "rows.csv", "pairs.json"):
        (tmp_path / name).write_text("{}")
    assert {path for path, _ in _commands()} == set(EXAMPLES)
    for path, command in _commands():
        assert command.help_epilogue is not None
        for line in EXAMPLES[path]:
            assert line in command.help_epilogue
            assert len(line) <= 78, "a terminal would break it"
            program, *words = shlex.split(line)
            assert program == "cutaway"
            function, _, unused = app.parse_args(words, exit_on_error=False, print_error=False)
            assert function is command.default_command
            assert not unused


def test_descriptions_are_wrapped_by_the_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["lens", "--help"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "--position" in line)
    assert "All if not given; the table shows the last one read." in line


def test_choices_that_help_names_are_those_of_the_library() -> None:
    from cutaway.causal import METRICS
    from cutaway.causal.ablations import AblationKind
    from cutaway.cli.causal.patch import patch

    assert get_args(MetricName) == tuple(METRICS)
    (ablation, *_) = get_args(patch.__annotations__["ablation"])  # beside its group in help
    assert get_args(ablation) == get_args(AblationKind)
