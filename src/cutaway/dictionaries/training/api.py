"""`cutaway.dictionaries.train`: from a model, a store or tensors to trained dictionaries, in memory or in a folder.

OUT/run.json, recipe.toml     what the folder belongs to, and the recipe that makes it again
OUT/NAME/                     each dictionary, in SAELens' layout
OUT/logs/NAME.jsonl           how its training went
OUT/manifest.json             model, corpus, configuration, version
OUT/checkpoints/              what a run that is interrupted goes on from; gone when all is done
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.artifacts.files import plain, write_json, write_text
from cutaway.artifacts.manifest import Manifest, ModelIdentity
from cutaway.artifacts.run_folder import RunFolder
from cutaway.data.corpus.corpus import split_rows
from cutaway.data.corpus.training_rows import training_rows
from cutaway.data.harvesting.settings import Rules
from cutaway.data.harvesting.store import MANIFEST, Store
from cutaway.dictionaries.dictionary import Port
from cutaway.dictionaries.formats.files import load, save
from cutaway.dictionaries.training.end_to_end import RowBatches
from cutaway.dictionaries.training.jobs import Job, Source, Trained, tokens_used, train_jobs
from cutaway.dictionaries.training.log import Logs, Tracking, read_log, trackers
from cutaway.dictionaries.training.parameters import Setting
from cutaway.dictionaries.training.recipe import Recipe, expand, written_out
from cutaway.dictionaries.training.sources import LiveRows, StoreSource, Tensors, find_ports
from cutaway.dictionaries.training.terms import EndToEnd
from cutaway.model.language_model import LanguageModel
from cutaway.model.own.file import load_module

_WRITES = ("recipe.toml", "manifest.json", "logs", "checkpoints", "tensorboard", "wandb", "judged.*")


TrainingData = LanguageModel | str | Path | Sequence[LanguageModel] | Store | Tensor | Mapping[str, Tensor]
CorpusInput = str | Path | Iterable[str] | Callable[[], Iterable[str]] | Tensor


def train(
    what: TrainingData,
    site: str | Sequence[str] = (),
    *,
    preset: str | Sequence[str] = "batchtopk",
    corpus: CorpusInput | None = None,
    out: str | Path | None = None,
    log: Tracking | Sequence[Tracking] = (),
    seconds_between_checkpoints: float = 30.0,
    resume: bool = True,
    **settings: Setting,
) -> dict[str, Trained]:
    """Train one dictionary, or a grid of them on one stream of activations.

    `preset=`, `d_sae=`, `k=`, `sparsity=`, `l0=`, `seed=` take one value or several: every combination is trained, all
    on the same batches.

    Args:
        what: A language model or its name (or two models, for crosscoders), which is run on `corpus`; or a harvested
            `Store` or its folder; or activations: a tensor [n, width], or tensors by site.
        site: Sites or wildcards to read. `to=` says what each is to be written as, which makes transcoders;
            `crosscoder=` sites with commas between.
        preset: Published ways of training (see `PRESETS`).
        corpus: A path, "hub:NAME", texts or a function that gives them, or rows of token ids [n, p]; goes with a
            model.
        out: A folder that everything is written to; the same call goes on with a run that was interrupted, bit for
            bit. In memory if None.
        log: "wandb", "tensorboard", or both.
        seconds_between_checkpoints: How often the state is written, with `out`.
        resume: Whether to go on with a run that is in `out`; begins again if not.
        **settings: Fields of `Recipe` (`tokens`, `batch`, `context`, `high_norm`, `passes`, ...) and of `TrainConfig`
            (`learning_rate`, `decoder_norm`, ...).

    Returns:
        What was trained, by name. A name says the site, and what is not the same for all: "blocks.3.resid_post",
        "blocks.3.resid_post-k16".

    Raises:
        NoSuchSite: the model has no such site.
        TooLarge: memory does not hold it.
        CutawayError: settings are unknown or do not fit, the corpus is shorter than a batch, activations are not
            finite, the disk is full, another process or another run is in the folder.

    Example:
        >>> import torch
        >>> trained = train(torch.randn(2_000, 8), d_sae=16, k=[1, 2], tokens=1_024, batch=256)
        >>> sorted(trained)
        ['activations-k1', 'activations-k2']
        >>> train("atlas", "blocks.3.resid_post", k=[16, 32], corpus="texts/")  # doctest: +SKIP
    """
    known = {item.name for item in fields(Recipe)}
    own = {name: value for name, value in settings.items() if name in known}
    options = {name: value for name, value in settings.items() if name not in known}
    recipe = Recipe.of({"site": site, "preset": preset, **own}, "train").changed(options=options or None)
    training = prepare(recipe, what, corpus)
    names: list[Any] = [log] if isinstance(log, str) else list(log)
    return run(training, out, log=names, seconds_between_checkpoints=seconds_between_checkpoints, resume=resume)


@dataclass(frozen=True)
class Training:
    """What is about to be trained."""

    recipe: Recipe
    """The recipe, every dictionary written out."""
    source: Source
    """Where activations come from."""
    jobs: Mapping[str, Job]
    """The dictionaries by name."""
    models: tuple[LanguageModel, ...] = ()
    """The models that are run."""
    held_out: Tensor | None = None
    """Rows of token ids that are kept out for judging [n, p]."""


def prepare(recipe: Recipe, what: TrainingData | None = None, corpus: CorpusInput | None = None) -> Training:
    """Load what a recipe names, read the corpus, and make the jobs; train nothing.

    Args:
        recipe: What is to be trained.
        what: Instead of what the recipe names; as `train`'s.
        corpus: Instead of what the recipe names; as `train`'s.

    Returns:
        What `estimate` and `train` take.

    Raises:
        CutawayError: as `train`.
    """
    if what is None:
        if sum(one is not None for one in (recipe.store, recipe.model, recipe.module)) > 1:
            raise CutawayError("activations come from a model, a module or a store: give one of them")
        what = recipe.store if recipe.store is not None else recipe.model
        if recipe.module is not None:
            what = (load_module(recipe.module), *([] if recipe.other is None else _load(recipe.other, None)))
        if what is None:
            raise CutawayError("nothing says what to train on: give a model and a corpus, or a store")
    if isinstance(what, (str, Path)) and (Path(what) / MANIFEST).is_file():
        what = Store.open(what)
    if isinstance(what, Tensor):
        (site,) = recipe.site or ("activations",)
        what, recipe = {site: what}, replace(recipe, site=(site,))
    if isinstance(what, Store | Mapping):
        if corpus is not None or recipe.corpus is not None or recipe.held_out:
            raise CutawayError("a corpus, and rows to judge on, go with a model; activations that are there have none")
        fixed = (
            "document_separator",
            "context",
            "bos",
            "first_position",
            "high_norm",
            "buffer_tokens",
            "passes",
            "other",
        )
        if given := [name for name in fixed if getattr(recipe, name) != getattr(Recipe(), name)]:
            raise CutawayError(f"'{given[0]}' goes with a model: which activations are there was decided before")
        return _at_hand(recipe, what)
    if isinstance(what, (str, Path)):
        what = _load(str(what), recipe.other)
    models: tuple[Any, ...] = tuple(what) if isinstance(what, (list, tuple)) else (what,)
    if not models or not all(isinstance(lm, LanguageModel) for lm in models):
        raise CutawayError(f"dictionaries are trained on a model, a store or tensors; not on a {type(what).__name__}")
    return _live(recipe, models, corpus)


def _load(name: str, other: str | None) -> tuple[LanguageModel, ...]:
    import cutaway

    return tuple(cutaway.load(one) for one in (name, other) if one is not None)


def _at_hand(recipe: Recipe, what: Store | Mapping[str, Tensor]) -> Training:
    seed = recipe.data_seed
    whole = StoreSource(what, seed=seed) if isinstance(what, Store) else Tensors(what, seed=seed)

    def find(pattern: str) -> dict[str, Port]:
        found = {name: port for name, port in whole.ports.items() if fnmatchcase(name, pattern)}
        if not found:
            raise NoSuchSite(f"there are no activations of '{pattern}'; there are {', '.join(whole.ports)}")
        return found

    jobs = expand(recipe, find)
    sites = list(dict.fromkeys(site for job in jobs.values() for site in job.sites))
    source = StoreSource(what, sites, seed=seed) if isinstance(what, Store) else whole
    folder = str(what.folder) if isinstance(what, Store) and what.folder is not None else recipe.store
    return Training(replace(written_out(recipe, jobs), store=folder), source, jobs)


def _live(recipe: Recipe, models: tuple[LanguageModel, ...], corpus: CorpusInput | None) -> Training:
    def find(pattern: str) -> dict[str, Port]:
        return {name: port for name, (_, port) in find_ports(models, pattern).items()}

    jobs = expand(recipe, find)
    # what is used, and a batch more, since each pass leaves less than one over; some tokens are BOS
    used = max(tokens_used(job) for job in jobs.values())
    fresh = round(1.03 * used / recipe.passes) + max(job.config.batch for job in jobs.values())
    given = recipe.corpus if corpus is None else corpus
    if given is None:
        raise CutawayError("a model needs a corpus to read: give a text file, a folder of them, or hub:NAME")
    rules = Rules(bos=recipe.bos, first_position=recipe.first_position, high_norm=recipe.high_norm)
    rows = training_rows(
        models[0],
        given,
        context=recipe.context or min(256, *(lm.context_length for lm in models)),
        tokens=fresh,
        more_rows=recipe.held_out,
        seed=recipe.data_seed,
        field=recipe.field,
        split=recipe.split,
        document_separator=recipe.document_separator,
    )
    held_out = None
    if recipe.held_out:
        parts = split_rows(rows, recipe.held_out, recipe.data_seed)
        rows, held_out = parts.train, parts.held_out
    sites = list(dict.fromkeys(site for job in jobs.values() for site in job.sites))
    seed = recipe.data_seed
    if any(isinstance(term, EndToEnd) for job in jobs.values() for term in job.config.terms):
        if models[1:]:
            raise CutawayError("end-to-end training is of one model")
        source: Source = RowBatches(models[0], rows, sites, rules=rules, seed=seed)
    else:
        source = LiveRows(
            models,
            rows,
            sites,
            rules=rules,
            passes=recipe.passes,
            buffer_tokens=recipe.buffer_tokens,
            seed=seed,
            low_precision=all(job.config.low_precision for job in jobs.values()),
        )
    names = {} if recipe.module is not None else {"model": recipe.model or models[0].loaded_from}
    if isinstance(given, (str, Path)):
        names["corpus"] = str(given)
    if models[1:]:
        names["other"] = recipe.other or models[1].loaded_from
    return Training(written_out(replace(recipe, **names), jobs), source, jobs, models, held_out)


def run(
    training: Training,
    out: str | Path | None = None,
    *,
    log: Sequence[Tracking] = (),
    seconds_between_checkpoints: float = 30.0,
    resume: bool = True,
) -> dict[str, Trained]:
    """Train what was prepared, in memory or in a folder (see `train`)."""
    if out is None:
        logs = Logs(None, trackers(log, None, training.source.identity))
        with contextlib.closing(logs):
            return train_jobs(training.source, training.jobs, on_begin=logs.begin, on_record=logs.record)
    out = Path(out)
    for job in training.jobs.values():
        training.source.batches(job.config.batch)  # refused before anything is written, if there is not one
    configuration = {
        "source": training.source.identity,
        "dictionaries": plain({name: asdict(job) for name, job in training.jobs.items()}),
    }
    if training.recipe.document_separator is not None:
        configuration["document_separator"] = training.recipe.document_separator
    with RunFolder.open(
        out, command="train", configuration=configuration, writes=(*_WRITES, *training.jobs), resume=resume
    ) as folder:
        if folder.step("trained") is not None:
            return {
                name: Trained(load(out / name), tuple(_history(out / "logs" / f"{name}.jsonl")))
                for name in training.jobs
            }
        for program in dict.fromkeys(log):
            folder.take(program)
        write_text(out / "recipe.toml", training.recipe.to_toml())
        manifest = _manifest(training)
        logs = Logs(out / "logs", trackers(log, out, manifest.id))
        with contextlib.closing(logs):
            trained = train_jobs(
                training.source,
                training.jobs,
                folder=out / "checkpoints",
                seconds_between_checkpoints=seconds_between_checkpoints,
                on_begin=logs.begin,
                on_record=logs.record,
            )
        for name, one in trained.items():
            metadata = {**one.dictionary.metadata, "manifest": manifest.id}
            save(replace(one.dictionary, metadata=metadata), out / name, overwrite=True)
        write_json(out / "manifest.json", manifest)
        last = {name: dict(one.history[-1]) for name, one in trained.items()}
        folder.save_step("trained", last, files=(*trained, "manifest.json"))
        folder.discard("checkpoints")
        return trained


def _history(path: Path) -> list[Mapping[str, float]]:
    extra = ("dead_share", "tokens_per_second")
    return [{key: value for key, value in record.items() if key not in extra} for record in read_log(path)]


def _manifest(training: Training) -> Manifest:
    metadata = training.source.metadata.get("data", {})
    model = training.models[0].identity() if training.models else None
    if model is None:
        named = next(iter(training.source.ports.values())).model
        model = ModelIdentity(**named) if named else None
    parents = [metadata["store"]] if "store" in metadata else []
    return Manifest.create(
        "dictionaries",
        model=model,
        corpus_hash=metadata.get("rows") or metadata.get("corpus"),
        configuration={"source": training.source.identity, "jobs": {n: asdict(j) for n, j in training.jobs.items()}},
        seed=training.recipe.data_seed,
        parents=parents,
        command=current_command(),
    )
