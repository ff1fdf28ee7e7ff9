"""What a user meets, and how the house stands, in numbers: names, parameters, documentation, files, circles.

    python tools/surface.py [--check] [--list MEASURE]

Reads src/cutaway as syntax trees, and the imports in docs/, examples/, notebooks and the README; nothing of cutaway is
imported. Prints the public names by package, then each measure with its bound and the target. With --check the exit
code is 1 where a measure is past its bound; with --list its findings are printed, one a line.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "cutaway"
FACES = (
    "",
    "artifacts",
    "causal",
    "data",
    "dictionaries",
    "draw",
    "features",
    "observe",
    "serve",
    "steering",
    "subjects",
    "tour",
)
"""The packages that hand names on to users, the first cutaway itself; every one has an `__init__.pyi` in the end."""

BOUNDS: dict[str, tuple[int, int]] = {
    # measure: (what --check allows today, what it is to come down to)
    "packages without a face": (0, 0),
    "names that hide a module": (0, 0),
    "functions with more than ten parameters": (0, 0),
    "undocumented parameters": (0, 0),
    "imports past a face": (0, 0),
    "files in the fullest folder": (20, 20),
    "lines of the longest file": (500, 500),
    "circles": (0, 0),
    "circles through function-level imports": (0, 0),
    "command as a parameter": (0, 0),
    "inputs typed Any": (0, 0),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One file of the source: its dotted name, its tree, and what names it takes from other modules."""

    name: str
    path: Path
    tree: ast.Module
    taken: dict[str, tuple[str, str]] = field(default_factory=dict)  # local name: (module, name there)
    imports: set[str] = field(default_factory=set)  # at module level, under TYPE_CHECKING too
    inner: set[str] = field(default_factory=set)  # inside functions

    @property
    def is_package(self) -> bool:
        return self.path.stem == "__init__"


@dataclass(frozen=True)
class Public:
    """A name that a package hands on, and where it is defined."""

    package: str
    name: str
    module: str
    node: ast.AST | None


# Reading --------------------------------------------------------------------------------------------------------------


def read_modules() -> dict[str, Module]:
    """Every .py file of the source by dotted name, with its imports resolved."""
    modules: dict[str, Module] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    for module in modules.values():
        _note_imports(module, modules)
    return modules


def _note_imports(module: Module, modules: dict[str, Module]) -> None:
    def visit(node: ast.AST, inside: bool, checked: bool) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            targets = module.inner if inside else module.imports
            for home, name, local in _imported(node, module):
                if f"{home}.{name}" in modules:
                    targets.add(f"{home}.{name}")
                elif home in modules and not (checked and module.is_package):
                    targets.add(home)
                if not inside and name:
                    module.taken[local] = (home, name)
            return
        within = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            typed = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            visit(child, within, checked or typed)

    visit(module.tree, False, False)
    for targets in (module.imports, module.inner):
        targets.discard(module.name)


def _imported(node: ast.Import | ast.ImportFrom, module: Module) -> Iterator[tuple[str, str, str]]:
    """(module, name in it or "", local name) of an import statement; of cutaway alone."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "cutaway":
                yield alias.name, "", alias.asname or alias.name
        return
    home = node.module or ""
    if node.level:
        package = module.name if module.is_package else module.name.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        home = f"{package}.{home}" if home else package
    if home.split(".")[0] == "cutaway":
        for alias in node.names:
            yield home, alias.name, alias.asname or alias.name


def definition(modules: dict[str, Module], home: str, name: str) -> tuple[str, ast.AST | None]:
    """Where a name is defined: the module, and its class, function or assignment."""
    for _ in range(10):
        module = modules.get(home)
        if module is None:
            return home, None
        for node in module.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return home, node
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return home, node
        if name not in module.taken:
            return home, None
        home, name = module.taken[name]
    return home, None


def public_names(modules: dict[str, Module], package: str) -> list[Public]:
    """What a package hands on: what its `__init__.pyi` imports, or, where it has none, what is in its `__all__`."""
    dotted = f"cutaway.{package}".rstrip(".")
    face = modules.get(dotted)
    if face is None:
        return []
    stub = face.path.with_suffix(".pyi")
    if stub.exists():
        read = Module(dotted, face.path, ast.parse(stub.read_text(encoding="utf-8")))
        _note_imports(read, modules)
        names = list(read.taken)
    else:
        read, names = face, _all_of(face.tree)
    found = []
    for name in sorted(names):
        home, there = read.taken.get(name, (dotted, name))
        if f"{home}.{there}" in modules:  # a package in the package
            continue
        module, node = definition(modules, home, there)
        found.append(Public(package, name, module, node))
    return found


def _all_of(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return [str(entry.value) for entry in getattr(node.value, "elts", ()) if isinstance(entry, ast.Constant)]
    return []


# Parameters -----------------------------------------------------------------------------------------------------------


def parameters(function: Function, *, method: bool = False) -> list[ast.arg]:
    """The parameters of a function, those with stars included, `self` and `cls` left out."""
    given = function.args
    named = [*given.posonlyargs, *given.args]
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if method and "staticmethod" not in decorators:
        named = named[1:]
    return [*named, *given.kwonlyargs, *(star for star in (given.vararg, given.kwarg) if star is not None)]


def methods(node: ast.ClassDef) -> Iterator[Function]:
    """The methods that a user calls: public ones, and how the class is made, called and indexed."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            overload = any(ast.unparse(one).endswith("overload") for one in child.decorator_list)
            if not overload and (not child.name.startswith("_") or child.name in ("__init__", "__call__")):
                yield child


def public_functions(module: Module) -> Iterator[tuple[str, Function, bool]]:
    """Name, function and whether it is a method, of all that is not private by its name."""
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node.name, node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for child in methods(node):
                yield f"{node.name}.{child.name}", child, True


_SECTION = re.compile(r"^(Args|Arguments|Attributes|Parameters|Other Parameters):\s*$")


def documented(docstring: str | None) -> set[str]:
    """The names that the sections `Args:` and `Attributes:` of a docstring describe."""
    found: set[str] = set()
    inside, indent = False, -1
    for line in (docstring or "").splitlines():
        depth = len(line) - len(line.lstrip())
        if _SECTION.match(line.strip()) and depth == 0:
            inside, indent = True, -1
        elif line.strip() and depth == 0:
            inside = False
        elif inside and line.strip():
            indent = depth if indent < 0 else indent
            if depth == indent and (match := re.match(r"([\w*, ]+?)\s*(\([^)]*\))?:", line.strip())):
                found |= {name.strip().lstrip("*") for name in match[1].split(",")}
    return found


def fields(node: ast.ClassDef) -> list[tuple[str, bool]]:
    """The public fields of a dataclass, TypedDict, NamedTuple or model, and whether a text stands below each."""
    decorators = {ast.unparse(decorator).split("(")[0].rpartition(".")[2] for decorator in node.decorator_list}
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    if not (decorators & {"dataclass", "final"} or bases & {"TypedDict", "NamedTuple", "BaseModel", "_Data"}):
        return []
    found = []
    for child, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            name = child.target.id
            if name.startswith("_") or "ClassVar" in ast.unparse(child.annotation):
                continue
            text = (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            )
            found.append((name, text))
    return found


def undocumented(name: str, node: ast.AST | None) -> Iterator[str]:
    """Parameters and fields of a handed-on name that no docstring describes."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        known = documented(ast.get_docstring(node))
        yield from (f"{name}({arg.arg})" for arg in parameters(node) if arg.arg not in known)
    if not isinstance(node, ast.ClassDef):
        return
    of_class = documented(ast.get_docstring(node))
    yield from (f"{name}.{one}" for one, text in fields(node) if not text and one not in of_class)
    for method in methods(node):
        known = documented(ast.get_docstring(method)) | (of_class if method.name == "__init__" else set())
        missing = (arg for arg in parameters(method, method=True) if arg.arg not in known)
        yield from (f"{name}.{method.name}({arg.arg})" for arg in missing)


def typed_any(annotation: ast.expr | None) -> bool:
    """Whether an input may be anything: `Any`, alone or in a union."""
    if annotation is None:
        return False
    return any(part.strip() == "Any" for part in ast.unparse(annotation).strip("'\"").split("|"))


def inputs_typed_any(public: Public) -> Iterator[str]:
    """The inputs of a handed-on function, or of a class's methods, that may be anything."""
    node, name = public.node, public.name
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield from (f"{name}({arg.arg})" for arg in parameters(node) if typed_any(arg.annotation))
    for method in methods(node) if isinstance(node, ast.ClassDef) else ():
        if method.name != "from_json":  # which takes what a file holds
            given = parameters(method, method=True)
            yield from (f"{name}.{method.name}({arg.arg})" for arg in given if typed_any(arg.annotation))


# Circles --------------------------------------------------------------------------------------------------------------


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of a graph that have more than one node (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    sys.setrecursionlimit(10_000)
    for node in sorted(edges):
        if node not in number:
            visit(node)
    return found


# What users are shown -------------------------------------------------------------------------------------------------

_PAST_A_FACE = re.compile(r"^\s*(?:>>> |\.\.\. )?(?:from (cutaway(?:\.\w+){2,}) import|import (cutaway(?:\.\w+){2,}))")


def shown_texts() -> Iterator[tuple[str, Iterable[str]]]:
    """The lines of README, docs, examples and notebooks, by file."""
    paths = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    for path in sorted(path for path in paths if path.exists()):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8").splitlines()
    for path in sorted(
        part for folder in ("docs", "examples", "notebooks") for part in ROOT.glob(f"{folder}/**/*.ipynb")
    ):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
        yield str(path.relative_to(ROOT)), lines


# All of it ------------------------------------------------------------------------------------------------------------


def measure(modules: dict[str, Module], public: dict[str, list[Public]]) -> dict[str, list[str] | int]:
    """Each measure's findings, or its number."""
    found: dict[str, list[str] | int] = {}
    found["packages without a face"] = [
        f"cutaway.{package}".rstrip(".")
        for package in FACES
        if (SOURCE / package).is_dir() and not (SOURCE / package / "__init__.pyi").exists()
    ]
    hiding: list[str] = []
    for name, package in ((f"cutaway.{one.package}".rstrip("."), one) for part in public.values() for one in part):
        if f"{name}.{package.name}" in modules:
            hiding.append(f"{name}.{package.name}")
    found["names that hide a module"] = hiding
    many: list[str] = []
    commands: list[str] = []
    for module in modules.values():
        parts = module.name.split(".")
        if "cli" in parts[1:2]:
            continue
        for name, function, method in public_functions(module):
            given = parameters(function, method=method)
            if len(given) > 10:
                many.append(f"{len(given)} {module.name}.{name}")
            if any(arg.arg == "command" for arg in given) and parts[1:2] not in (["artifacts"], ["draw"]):
                commands.append(f"{module.name}.{name}")
    found["functions with more than ten parameters"] = sorted(many, reverse=True)
    homes = {(one.module, one.name): one for part in public.values() for one in part}
    found["undocumented parameters"] = [
        f"{module}: {entry}" for (module, name), one in homes.items() for entry in undocumented(name, one.node)
    ]
    found["imports past a face"] = [
        f"{path}:{number}: {match[1] or match[2]}"
        for path, lines in shown_texts()
        for number, line in enumerate(lines, 1)
        if (match := _PAST_A_FACE.match(line))
    ]
    folders: dict[Path, int] = defaultdict(int)
    lengths = {}
    for module in modules.values():
        folders[module.path.parent] += 1
        lengths[module.path] = len(module.path.read_text(encoding="utf-8").splitlines())
    found["files in the fullest folder"] = max(folders.values(), default=0)
    found["lines of the longest file"] = max(lengths.values(), default=0)
    plain = {name: module.imports for name, module in modules.items()}
    every = {name: module.imports | module.inner for name, module in modules.items()}
    rings = circles(plain)
    found["circles"] = [" ↔ ".join(part) for part in rings]
    found["circles through function-level imports"] = [" ↔ ".join(part) for part in circles(every) if part not in rings]
    found["command as a parameter"] = commands
    found["inputs typed Any"] = [
        f"{module}: {entry}" for (module, _), one in homes.items() for entry in inputs_typed_any(one)
    ]
    return found


def main(arguments: list[str]) -> int:
    modules = read_modules()
    public = {package: public_names(modules, package) for package in FACES}
    found = measure(modules, public)
    if "--list" in arguments:
        wanted = arguments[arguments.index("--list") + 1]
        for name, findings in found.items():
            if wanted in name:
                print(f"# {name}", *([findings] if isinstance(findings, int) else findings), sep="\n")
        return 0
    for package, names in public.items():
        print(f"{f'cutaway.{package}'.rstrip('.')}: {len(names)} names")
    print()
    past = 0
    for name, (bound, target) in BOUNDS.items():
        findings = found[name]
        value = findings if isinstance(findings, int) else len(findings)
        over = value > bound
        past += over
        print(f"{value:6,}  {name}  (at most {bound:,}; target {target:,}){'  PAST ITS BOUND' if over else ''}")
    return 1 if past and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
