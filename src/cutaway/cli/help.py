"""How help is laid out: parameters in the same groups and the same order in every command, and an example of each.

Commands are written with their parameters in whatever order reads well there; what is asked of a model, how much of it
is run and what becomes of it stand apart in help, decided here once.
"""

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from cyclopts import App, Group, Parameter

ASKED, METHOD, RUN, OUTPUT = (
    Group(name, sort_key=place) for place, name in enumerate(("What is asked", "Method", "Run", "Output"), start=1)
)
GROUPS: dict[Group, tuple[str, ...]] = {
    ASKED: (
        "model", "task", "split", "pairs", "data", "prompts", "subject", "answer", "wrong", "target", "position",
        "site", "to", "corpus", "document_separator", "module",
    ),
    RUN: ("n", "tokens", "rows", "context", "steps", "batch", "lr", "draws", "seed", "dtype", "device"),
    OUTPUT: ("out", "html", "json", "overwrite"),
}  # fmt: skip
"""Group → the parameters that stand in it, in this order; all others are the method's, as their command has them."""

MODELS = "MODEL is “atlas” (the model that comes along), a Hugging Face folder, or a hub id."
_DALLAS = '"Dallas is a city in the state of"'
_SITE = "blocks.3.resid_post"
EXAMPLES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("tour",): ("cutaway tour atlas --out runs/tour",),
    ("check",): ("cutaway check atlas",),
    ("sites",): ("cutaway sites atlas",),
    ("lens",): (
        f"cutaway lens atlas {_DALLAS} --html lens.html",
        "cutaway lens atlas --train world --out runs/tuned",
    ),
    ("heads",): ("cutaway heads atlas --html heads.html",),
    ("attribute",): (f"cutaway attribute atlas {_DALLAS} --by head",),
    ("saliency",): (f"cutaway saliency atlas {_DALLAS} --html page.html",),
    ("probe",): (f"cutaway probe atlas rows.csv --site {_SITE} --html probe.html",),
    ("tasks",): ("cutaway tasks atlas", 'cutaway tasks atlas --task "two-hop capitals" --out pairs.json'),
    ("patch",): (
        'cutaway patch atlas --task "two-hop capitals" --html patch.html',
        "cutaway patch atlas --pairs pairs.json --over heads --metric probability",
    ),
    ("trace",): (f"cutaway trace atlas {_DALLAS} --subject Dallas", "cutaway trace atlas --n 55"),
    ("circuit",): ('cutaway circuit atlas --task "world indirect object" --html circuit.html',),
    ("open",): ("cutaway open atlas",),
    ("harvest",): (f"cutaway harvest atlas --corpus text.jsonl --site {_SITE} --out h",),
    ("train",): (f"cutaway train atlas --corpus text.jsonl --site {_SITE} --out sae",),
    ("dictionary", "inspect"): (f"cutaway dictionary inspect atlas/{_SITE} --model atlas",),
    ("dictionary", "judge"): ("cutaway dictionary judge sae --model atlas --corpus text.jsonl",),
    ("dictionary", "convert"): ("cutaway dictionary convert sae converted --format sparsify",),
    ("dictionary", "presets"): ("cutaway dictionary presets",),
    ("dictionary", "banks"): ("cutaway dictionary banks --model gemma",),
    ("subjects", "train"): ("cutaway subjects train atlas --from atlas --tokens 1000000",),
    ("subjects", "evaluate"): ("cutaway subjects evaluate atlas --quick",),
    ("subjects", "pair"): ("cutaway subjects pair atlas --out runs/pair",),
    ("subjects", "text"): ("cutaway subjects text atlas --out text.jsonl --characters 1000000",),
    ("subjects", "samples"): ("cutaway subjects samples facts",),
    ("subjects", "superposition"): ("cutaway subjects superposition --html superposition.html",),
}
"""Command → lines that show what it is for."""


def lay_out(app: App) -> None:
    """Put the options of each command into groups and one order, its descriptions into lines of no fixed width, and its
    examples under its help.
    """
    for path, lines in EXAMPLES.items():
        command = app
        for name in path:
            command = command[name]
        function = command.default_command
        assert function is not None
        _order(function)
        function.__doc__ = _unwrapped(function.__doc__ or "")
        title = "Example" if len(lines) == 1 else "Examples"
        command.help_epilogue = "\n".join([f"{title}:", *(f"  {line}" for line in lines), "", MODELS])


def _order(command: Callable[..., Any]) -> None:
    """Only what the command line sees of the function is in another order: its signature."""
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    places = {name: (group, place) for group, names in GROUPS.items() for place, name in enumerate(names)}
    fixed, options = [], []
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            fixed.append(parameter)
            continue
        group, place = places.get(parameter.name, (METHOD, len(options)))
        hint = command.__annotations__[parameter.name] = Annotated[hints[parameter.name], Parameter(group=group)]
        options.append((group.sort_key, place, parameter.replace(annotation=hint)))
    options.sort(key=lambda one: one[:2])
    ordered = signature.replace(parameters=[*fixed, *(one[-1] for one in options)])
    command.__signature__ = ordered  # type: ignore[attr-defined]


def _unwrapped(docstring: str) -> str:
    """A parameter's description in one line: the terminal's width is not the source's."""
    return re.sub(r"(?<=\S)\n {4}(?=\S)", _joined, inspect.cleandoc(docstring))


def _joined(found: re.Match[str]) -> str:
    before = found.string[: found.start()].rsplit("\n", 1)[-1]
    return " " if before.startswith("    ") else found.group()
