"""The pages of docs/reference/, made of docstrings and stubs: one page per package that hands names on.

The source is read as syntax trees (tools/surface.py says which names are public); nothing of cutaway is imported.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator

import surface

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")
_LINE = 100


def pages() -> dict[str, str]:
    """Every page by its name in docs/reference/, the index first."""
    modules = surface.read_modules()
    made: dict[str, str] = {}
    index = []
    for package in surface.FACES:
        names = surface.public_names(modules, package)
        face = modules.get(f"cutaway.{package}".rstrip("."))
        if not names or face is None:
            continue
        dotted = face.name
        page = f"{package or 'cutaway'}.md"
        text = ast.get_docstring(face.tree) or ""
        made[page] = _page(dotted, text, names, modules)
        index.append(f"| [`{dotted}`]({page}) | {text.splitlines()[0] if text else ''} |")
    head = ["# Reference", "", "Made by `make docs` from docstrings.", "", "| package | |", "|---|---|"]
    return {"README.md": "\n".join([*head, *index]) + "\n", **made}


def _page(dotted: str, text: str, names: list[surface.Public], modules: dict[str, surface.Module]) -> str:
    parts = [f"# `{dotted}`", "", *_prose(text), ""]
    seen: Counter[str] = Counter()
    links = []
    for one in names:
        anchor = one.name.lower()
        links.append(f"[`{one.name}`](#{anchor}{f'-{seen[anchor]}' if seen[anchor] else ''})")
        seen[anchor] += 1
    parts += [" · ".join(links), ""]
    for one in names:
        parts += [f"## `{one.name}`", "", *_definition(one, modules), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _definition(public: surface.Public, modules: dict[str, surface.Module]) -> Iterator[str]:
    node, name = public.node, public.name
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield from _code(_signature(node, name))
        yield from _documentation(ast.get_docstring(node))
    elif isinstance(node, ast.ClassDef):
        yield from _class(node, name)
    elif node is not None:
        module = modules[public.module]
        yield from _code(_assignment(node))
        yield from _prose(_text_below(node, module.tree.body))


def _class(node: ast.ClassDef, name: str) -> Iterator[str]:
    fields = surface.fields(node)
    init = next((m for m in surface.methods(node) if m.name == "__init__"), None)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield from _code(_signature(init, name, method=True) if init else f"class {name}{f'({bases})' if bases else ''}")
    docstring = ast.get_docstring(node)
    yield from _documentation(docstring)
    if fields and any(text for _, text in fields):
        yield from ("**Fields**", "")
        for child in node.body:
            if isinstance(child, ast.AnnAssign) and getattr(child.target, "id", "") in dict(fields):
                text = " ".join(_text_below(child, node.body).split())
                yield f"- `{ast.unparse(child)}`{f': {text}' if text else ''}"
        yield ""
    properties = []
    for method in surface.methods(node):
        if method.name == "__init__":
            continue
        decorators = {ast.unparse(one) for one in method.decorator_list}
        if decorators & {"property", "cached_property", "functools.cached_property"}:
            first = " ".join((ast.get_docstring(method) or "").split())
            returns = f": {_type(method.returns)}" if method.returns else ""
            properties.append(f"- `{method.name}{returns}`{f': {first}' if first else ''}")
            continue
        yield from (f"### `{name}.{method.name.strip('_')}`", "")
        yield from _code(_signature(method, method.name, method="staticmethod" not in decorators))
        yield from _documentation(ast.get_docstring(method))
    if properties:
        yield from ("**Properties**", "", *properties, "")


def _signature(function: surface.Function, name: str, *, method: bool = False) -> str:
    """A call as it is written, one parameter per line where it is long."""
    entries = _parameters(function.args)
    if method:
        entries = [entry for entry in entries if entry != "/"][1:]
    returns = f" -> {_type(function.returns)}" if function.returns and name[0].islower() else ""
    line = f"{name}({', '.join(entries)}){returns}"
    if len(line) <= _LINE:
        return line
    return f"{name}(\n" + "".join(f"    {entry},\n" for entry in entries) + f"){returns}"


def _parameters(given: ast.arguments) -> list[str]:
    placed = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [*[None] * (len(placed) - len(given.defaults)), *given.defaults]
    entries = [_parameter(one, default) for one, default in zip(placed, defaults, strict=True)]
    if given.posonlyargs:
        entries.insert(len(given.posonlyargs), "/")
    if given.vararg:
        entries.append(f"*{_parameter(given.vararg, None)}")
    elif given.kwonlyargs:
        entries.append("*")
    entries += [_parameter(one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*entries, f"**{_parameter(given.kwarg, None)}"] if given.kwarg else entries


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    kind = f": {_type(one.annotation)}" if one.annotation else ""
    equal = " = " if kind else "="
    return f"{one.arg}{kind}{'' if default is None else equal + ast.unparse(default)}"


def _type(annotation: ast.expr) -> str:
    """An annotation without the quotes of a name that is defined later."""
    text = ast.unparse(annotation)
    return text[1:-1] if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str) else text


def _assignment(node: ast.AST) -> str:
    if isinstance(node, ast.AnnAssign):
        return f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}"
    text = ast.unparse(node)
    return text if len(text) <= 3 * _LINE else text[: _LINE - 2] + " …"


def _text_below(node: ast.AST, body: list[ast.stmt]) -> str:
    after = body[body.index(node) + 1 :] if node in body else []  # pyright: ignore[reportArgumentType]
    value = after[0].value if after and isinstance(after[0], ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _documentation(docstring: str | None) -> Iterator[str]:
    """A docstring in Google's form as Markdown."""
    prose: list[str] = []
    lines = (docstring or "").splitlines()
    place = 0
    while place < len(lines):
        match = re.match(rf"({'|'.join(_SECTIONS)}):\s*$", lines[place])
        if match is None:
            prose.append(lines[place])
            place += 1
            continue
        body = []
        place += 1
        while place < len(lines) and (not lines[place].strip() or lines[place].startswith(" ")):
            body.append(lines[place])
            place += 1
        yield from _prose("\n".join(prose))
        prose = []
        yield from _section(match[1], textwrap.dedent("\n".join(body)).strip("\n"))
    yield from _prose("\n".join(prose))


def _section(title: str, body: str) -> Iterator[str]:
    if title.startswith("Example"):
        yield from ("**Example**", "", "```python no-run", *body.splitlines(), "```", "")
        return
    if title in ("Returns", "Yields"):
        yield from (f"**{title}** {' '.join(body.split())}", "")
        return
    yield from (f"**{title}**", "")
    entries: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        elif line.strip():
            entries.append(line.strip())
    for entry in entries:
        name, colon, text = entry.partition(":")
        yield f"- `{name}`:{text}" if colon and re.fullmatch(r"[\w*, .()\[\]|]+", name) else f"- {entry}"
    yield ""


def _prose(text: str) -> Iterator[str]:
    yield from text.strip("\n").splitlines()
    yield ""


def _code(text: str) -> Iterator[str]:
    yield from ("```pyi", *text.splitlines(), "```", "")
