"""What is to be trained, as a file says it: a grid of presets, or each dictionary by itself.

    model = "atlas"
    corpus = "texts/"
    site = "blocks.3.resid_post"
    preset = ["batchtopk", "gemma-scope-1"]
    k = [16, 32, 64]

names eight settings at most; `expand` makes of it one job for each cell of the grid, and `written_out` the same recipe
with every dictionary's whole configuration, which is what a run leaves behind and what can be run again.
"""

import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from dataclasses import field as member
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import plain, read_text
from cutaway.dictionaries.dictionary import Port
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.jobs import Job
from cutaway.dictionaries.training.parameters import Plain, Setting
from cutaway.dictionaries.training.presets import PRESETS, preset

Find = Callable[[str], Mapping[str, Port]]
"""The ports that a site or a wildcard stands for, by name."""


def _several(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if isinstance(value, (list, tuple)) else (value,)


_GRID = ("site", "to", "crosscoder", "preset", "d_sae", "k", "sparsity", "l0", "seed")

Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]
Counts = Annotated[tuple[int, ...], BeforeValidator(_several)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_several)]


@dataclass(frozen=True)
class Plan(Plain):
    """One dictionary of a recipe."""

    reads: Texts
    """The sites that it reads."""
    writes: Texts = ()
    """The sites that it writes, if others."""
    preset: str = ""
    """Where `config` came from, for those who read it; it sets nothing."""
    config: dict[str, Any] = member(default_factory=dict)
    """Fields of its `TrainConfig`."""


@dataclass(frozen=True)
class Recipe(Plain):
    """All that decides what is trained: where activations come from, and a grid of dictionaries, or each by name.

    The grid is every `preset` × `d_sae` × what sets its sparsity (`k`, or `sparsity` or `l0`) × `seed`, on its kind of
    ports. Where `dictionaries` says each by name, `tokens`, `batch`, one `seed` and `options` hold for all.
    """

    model: str | None = None
    """A model's name."""
    module: str | None = None
    """Instead of a name, FILE.py:function, which makes the model."""
    other: str | None = None
    """A second model, for crosscoders between models."""
    store: str | None = None
    """A harvested store's folder, instead of a model and a corpus."""
    corpus: str | None = None
    """A text file, a folder of them, or hub:NAME."""
    field: str = "text"
    """Where a record of the corpus has its text."""
    split: str = "train"
    """Which split of a data set."""
    document_separator: str | None = None
    """What stands between documents in .txt files; blank lines if None."""
    context: int | None = None
    """Tokens that the model reads at once; 256, or all that a smaller model reads, if None."""
    bos: Literal["drop", "keep"] = "drop"
    """Whether beginning-of-text tokens are trained on."""
    first_position: Literal["drop", "keep"] = "drop"
    """Whether the first token of each row is."""
    high_norm: float | None = None
    """Leave out tokens whose vector is longer than so many times the median at any site."""
    passes: int = 4
    """How often a buffer of activations is used before the next is computed."""
    buffer_tokens: int | None = None
    """Tokens whose activations are held at once; 262,144, or as many as fill 1 GiB, if None."""
    held_out: int = 0
    """Rows that are kept out of training, for judging."""
    data_seed: int = 0
    """Shuffles documents, rows and tokens."""
    site: Texts = ()
    """Sites or wildcards to read, each by a dictionary of its own."""
    to: Texts = ()
    """What each `site` is to be written as: transcoders."""
    crosscoder: Texts = ()
    """Sites with commas between, which one dictionary reads and writes together."""
    preset: Texts = ()
    """Names of `PRESETS`; "batchtopk" if empty."""
    d_sae: Counts = ()
    """Latents; 16 times the width of what is read if empty."""
    k: Counts = ()
    """Active latents per token, for presets that set them."""
    sparsity: Numbers = ()
    """The coefficient of the sparsity term, for presets that have one."""
    l0: Numbers = ()
    """For JumpReLU: drive the number of active latents to this instead."""
    seed: Counts = ()
    """Of the first weights."""
    tokens: int | None = None
    """Tokens to train on, each counted whenever it is used; 4 million if None."""
    batch: int | None = None
    """Tokens per step; 512 if None."""
    options: dict[str, Any] = member(default_factory=dict)
    """Other fields of `TrainConfig`."""
    dictionaries: dict[str, Plan] = member(default_factory=dict)
    """Instead of a grid, each dictionary by name."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "the recipe") -> "Recipe":
        """The recipe that plain values describe; raises `CutawayError` that names the first that is wrong.

        Args:
            values: Fields of a recipe by name, as TOML or JSON holds them.
            where: What an error calls them.
        """
        try:
            return _adapter().validate_python(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "it"
            known = ", ".join(item.name for item in fields(cls))
            hint = f" (there are {known})" if first["type"] == "unexpected_keyword_argument" else ""
            raise CutawayError(f"{where}: {place}: {first['msg']}{hint}") from error

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in a TOML file.

        Args:
            path: The file.
        """
        try:
            values = tomllib.loads(read_text(path))
        except (ValueError, RecursionError) as error:  # also for a number of more digits than Python reads
            raise CutawayError(f"{path} is not TOML: {' '.join(str(error).split())[:200]}") from error
        return cls.of(values, str(path))

    def changed(self, **values: Setting) -> "Recipe":
        """The recipe with some values instead; `options` are joined.

        Args:
            **values: Fields of a recipe; one that is None stays as it is.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if isinstance(options := given.get("options"), Mapping):
            given["options"] = {**self.options, **options}
        return Recipe.of({**_shallow(self), **given}, "the options")

    def to_toml(self) -> str:
        """The recipe as a file; what is at its default is left out."""
        import tomli_w

        empty = Recipe()
        values = {
            name: value for name, value in _shallow(self).items() if value != getattr(empty, name) and value is not None
        }
        return tomli_w.dumps(_without_nulls(plain({**values, "dictionaries": _plans(self.dictionaries)})))


@cache
def _adapter() -> Any:
    return TypeAdapter(Recipe)


def _shallow(recipe: Recipe) -> dict[str, Any]:
    return {item.name: getattr(recipe, item.name) for item in fields(recipe)}


def _plans(plans: Mapping[str, Plan]) -> dict[str, Any]:
    found = {}
    for name, one in plans.items():
        found[name] = {key: value for key, value in asdict(one).items() if value}
    return found


def _without_nulls(value: Any) -> Any:
    """TOML has no null. All of ours are defaults, which may be left out, but for one."""
    if isinstance(value, dict):
        filled = {key: "auto" if key == "learning_rate" and one is None else one for key, one in value.items()}
        return {key: _without_nulls(one) for key, one in filled.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def written_out(recipe: Recipe, jobs: Mapping[str, Job]) -> Recipe:
    """The same recipe with each dictionary by name instead of the grid."""
    plans = {name: Plan(job.reads, job.writes, job.preset, plain(job.config.to_json())) for name, job in jobs.items()}
    return replace(
        recipe, **dict.fromkeys(_GRID, ()), tokens=None, batch=None, options={}, dictionaries=plans
    )  # fmt: skip


def expand(recipe: Recipe, find: Find) -> dict[str, Job]:
    """The jobs of a recipe by name. A name says the ports, and whatever is not the same for all.

    Raises `CutawayError` for what does not fit together: a preset without its kind of ports, a `k` that no preset has,
    a grid beside named dictionaries.
    """
    if recipe.dictionaries:
        return _named(recipe, find)
    cells = list(_cells(recipe, find))
    if not cells:
        raise CutawayError("nothing says where to train: give a site, such as blocks.3.resid_post")
    parts = ("preset", "d_sae", "k", "l0", "sparsity", "seed")
    varies = [part for part in parts if len({cell.values.get(part) for cell in cells}) > 1]
    jobs: dict[str, Job] = {}
    for cell in cells:
        said = [_SAID[part](cell.values[part]) for part in varies if cell.values.get(part) is not None]
        name = _as_folder("-".join([cell.ports.label, *said]))
        if name in jobs:
            raise CutawayError(f"{name} would be trained twice: leave out what is given twice")
        jobs[name] = Job(cell.config(recipe), cell.ports.reads, cell.ports.writes, cell.values["preset"])
    return jobs


_SAID: dict[str, Callable[[Any], str]] = {
    "preset": str,
    "d_sae": lambda value: f"f{value}",
    "k": lambda value: f"k{value}",
    "l0": lambda value: f"l{value:g}",
    "sparsity": lambda value: f"c{value:g}",
    "seed": lambda value: f"s{value}",
}


@dataclass(frozen=True)
class _Ports:
    kind: Literal["sae", "transcoder", "crosscoder"]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    width: int

    @property
    def label(self) -> str:
        reads = "+".join(self.reads)
        return f"{reads}-to-{'+'.join(self.writes)}" if self.writes else reads


@dataclass(frozen=True)
class _Cell:
    ports: _Ports
    values: dict[str, Any]

    def config(self, recipe: Recipe) -> TrainConfig:
        values = {key: value for key, value in self.values.items() if value is not None}
        options = _options(recipe)
        if self.ports.kind == "transcoder":  # there b_dec is of another tensor than what is read
            options.setdefault("subtract_b_dec", False)
        name = values.pop("preset")
        given = {**values, **options}
        for key, value in (("tokens", recipe.tokens), ("batch", recipe.batch)):
            if value is not None:
                given[key] = value
        config = preset(name, d_in=self.ports.width, **given)
        if self.ports.kind == "crosscoder" and config.input_norm and "input_norm" not in given:
            # several tensors have no common norm of a token; each gets its own scale of the data set
            config = preset(name, d_in=self.ports.width, **{"normalise": "mean_norm", **given, "input_norm": None})
        return config


def _options(recipe: Recipe) -> dict[str, Any]:
    options = dict(recipe.options)
    if options.get("learning_rate") == "auto":
        options["learning_rate"] = None
    return options


def _cells(recipe: Recipe, find: Find) -> Iterable[_Cell]:
    names = recipe.preset or ("batchtopk",)
    for name in names:
        if name not in PRESETS:
            raise CutawayError(f"'{name}' is not a preset: there are {', '.join(PRESETS)}")
    _check_controls(recipe, names)
    ports = list(_ports(recipe, find))
    used: set[str] = set()
    for name in names:
        kind = PRESETS[name].kind
        wanted = "transcoder" if kind == "skip_transcoder" else kind
        own = [one for one in ports if one.kind == wanted]
        if not own and wanted == "sae":  # a selector and its loss, on whatever there is
            own = ports
        if not own and ports:
            way = {"transcoder": "give 'to' beside 'site'", "crosscoder": "give 'crosscoder', several sites"}[wanted]
            raise CutawayError(f"the preset {name} is of a {wanted}: {way}")
        used |= {one.kind for one in own}
        for one, d_sae, sparse, seed in itertools.product(
            own, recipe.d_sae or (None,), _sparsities(recipe, name), recipe.seed or (0,)
        ):
            yield _Cell(one, {"preset": name, "d_sae": d_sae, **sparse, "seed": seed})
    for one in ports:
        if one.kind not in used:
            raise CutawayError(f"no preset is of the kind of {one.label}, a {one.kind}: name one that is")


def _sparsities(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    control = PRESETS[name].control
    if control == "k":
        found = [{"k": k} for k in recipe.k]
    else:
        found = [{"sparsity": value} for value in recipe.sparsity]
        found += [{"l0": value} for value in recipe.l0] if control == "coefficient or l0" else []
    return found or [{}]


def _check_controls(recipe: Recipe, names: Sequence[str]) -> None:
    controls = " ".join(PRESETS[name].control for name in names).split()
    for given, word in (("k", "k"), ("sparsity", "coefficient"), ("l0", "l0")):
        if getattr(recipe, given) and word not in controls:
            takes = [name for name, one in PRESETS.items() if word in one.control.split()]
            raise CutawayError(f"{given} says nothing to {', '.join(names)}; presets that take it: {', '.join(takes)}")


def _ports(recipe: Recipe, find: Find) -> Iterable[_Ports]:
    sites = [(name, port) for pattern in recipe.site for name, port in find(pattern).items()]
    if recipe.to:
        outs = [name for pattern in recipe.to for name in find(pattern)]
        if len(outs) != len(sites):
            raise CutawayError(
                f"each site needs what it is to be written to: there are {len(sites)} under 'site' and {len(outs)} "
                "under 'to'"
            )
        for (name, port), out in zip(sites, outs, strict=True):
            yield _Ports("transcoder", (name,), (out,), port.width)
    else:
        for name, port in dict(sites).items():
            yield _Ports("sae", (name,), (), port.width)
    for group in recipe.crosscoder:
        found = {name: port for part in group.split(",") for name, port in find(part.strip()).items()}
        if len(found) < 2:
            raise CutawayError(f"a crosscoder reads several sites; '{group}' is {len(found)}: put commas between them")
        yield _Ports("crosscoder", tuple(found), (), sum(port.width for port in found.values()))


def _named(recipe: Recipe, find: Find) -> dict[str, Job]:
    grid = [name for name in _GRID if name != "seed" and getattr(recipe, name)]
    if grid or len(recipe.seed) > 1:
        raise CutawayError(
            f"the recipe names its dictionaries, so '{grid[0] if grid else 'seed'}' cannot make a grid: change them in "
            "the recipe, or leave them out of it"
        )
    given = {"tokens": recipe.tokens, "batch": recipe.batch, "seed": recipe.seed[0] if recipe.seed else None}
    over = {key: value for key, value in given.items() if value is not None} | _options(recipe)
    jobs: dict[str, Job] = {}
    for name, one in recipe.dictionaries.items():
        if name != _as_folder(name) or name.startswith("."):
            raise CutawayError(f"'{name}' cannot be the name of a folder: letters, digits, '.', '_', '+' and '-' can")
        reads, writes = (
            tuple(port for pattern in patterns for port in find(pattern)) for patterns in (one.reads, one.writes)
        )
        values = {**one.config, **over}
        if values.get("learning_rate") == "auto":
            values["learning_rate"] = None
        jobs[name] = Job(TrainConfig.from_json(values), reads, writes, one.preset)
    return jobs


def _as_folder(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)
