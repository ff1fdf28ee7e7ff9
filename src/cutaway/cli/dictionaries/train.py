"""`cutaway train`: dictionaries of a model's activations."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from cutaway.artifacts.errors import CutawayError
from cutaway.cli.fit import say
from cutaway.cli.options import Count, Flag, ModuleFile, Seed, Separator, announce, say_loading
from cutaway.cli.output import print_result, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cutaway.dictionaries.evaluation.frontier import Frontier
    from cutaway.dictionaries.training.api import Training
    from cutaway.dictionaries.training.jobs import Trained

Several = Parameter(consume_multiple=True, negative="")
Positive = Annotated[float, Parameter(validator=validators.Number(gt=0))]


def train(
    model: str | None = None,
    /,
    *,
    site: Annotated[list[str] | None, Several] = None,
    to: Annotated[list[str] | None, Several] = None,
    crosscoder: Annotated[list[str] | None, Several] = None,
    preset: Annotated[list[str] | None, Several] = None,
    corpus: str | None = None,
    out: Path | None = None,
    d_sae: Annotated[list[Count] | None, Several] = None,
    k: Annotated[list[Count] | None, Several] = None,
    sparsity: Annotated[list[Positive] | None, Several] = None,
    l0: Annotated[list[Positive] | None, Several] = None,
    seed: Annotated[list[Seed] | None, Several] = None,
    tokens: Count | None = None,
    batch: Count | None = None,
    lr: Positive | None = None,
    assign: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True, negative="")] = None,
    low_precision: Flag = False,
    store: Path | None = None,
    other: str | None = None,
    module: ModuleFile = None,
    recipe: Path | None = None,
    context: Count | None = None,
    passes: Count | None = None,
    buffer_tokens: Count | None = None,
    keep_bos: Flag = False,
    keep_first: Flag = False,
    high_norm: float | None = None,
    field: str | None = None,
    split: str | None = None,
    document_separator: Separator = None,
    held_out: Count | None = None,
    data_seed: Seed | None = None,
    log: Annotated[list[Literal["wandb", "tensorboard"]] | None, Several] = None,
    print_recipe: Flag = False,
    dry_run: Flag = False,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Train sparse dictionaries on a model's activations: one, or a grid that shares each forward.

    Every site × preset × width × sparsity × seed is trained on the same batches. The same command goes on where an
    interrupted one stopped, and ends with the same weights, bit for bit. “cutaway dictionary presets” has the presets.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id. Leave it out with --store, or where the recipe names it.
    site
        Where to read: a site such as blocks.3.resid_post, or a wildcard; several make a grid.
    to
        Write these sites instead, each from the --site in the same place: a transcoder, such as blocks.3.mlp.in to
        blocks.3.mlp.out.
    crosscoder
        Sites with commas between, which one dictionary reads and writes together. With --other: MODEL:SITE, or a site
        of both models.
    preset
        How: batchtopk if not given, or a published way such as openai-topk, gemma-scope-1, transcoder.
    corpus
        A text file or a folder of them (.txt, .md, .py, .jsonl, .parquet), or hub:NAME for a data set of the hub.
    out
        The folder: a new one, an empty one, or one that this command began.
    d_sae
        Latents; 16 times the width of what is read if not given.
    k
        Active latents of a token, for presets that set them; 32 if not given.
    sparsity
        The coefficient of the sparsity term, for presets that have one; the published one if not given.
    l0
        For JumpReLU: drive the number of active latents to this instead.
    seed
        Of the first weights; several train as many dictionaries on the same data.
    tokens
        Tokens to train on, each counted whenever it is used; 4 million if not given.
    batch
        Tokens in a step; 512 if not given.
    lr
        The highest learning rate; the preset's if not given.
    assign
        Any other field of a training configuration, as TOML: decoder_norm="free", warmup=500.
    low_precision
        Let matrix products run in bfloat16 where what is chosen by them is computed again in float32.
    store
        A folder that “cutaway harvest” wrote, instead of a model and a corpus.
    other
        A second model with the same tokenizer, for crosscoders between models.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    recipe
        A TOML file with any of these settings; what the command line says wins.
    context
        Tokens that the model reads at once; 256, or all that a smaller model reads, if not given.
    passes
        How often a buffer of activations is used before the next is computed; 4 if not given.
    buffer_tokens
        Tokens whose activations are held at once; 262,144, or as many as fill 1 GiB, if not given.
    keep_bos
        Train on beginning-of-text tokens too, whose vectors are often extreme.
    keep_first
        Train on the first token of each row too, for which the same is true.
    high_norm
        Leave out tokens whose vector is longer than so many times the median at any site.
    field
        Where a record of a .jsonl or .parquet file, or of a data set, has its text.
    split
        Which split of a data set.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    held_out
        Keep so many rows out of training, and judge on them in the end: a table here, OUT/judged.html and .json.
    data_seed
        Shuffles documents, rows and tokens.
    log
        Send figures there too; they are in OUT/logs as JSON lines anyway.
    print_recipe
        Print the whole recipe, each dictionary written out, and train nothing.
    dry_run
        Print parameters, operations, memory and expected time, and train nothing.
    overwrite
        Begin again in a folder that holds a run.
    json
        Print the result as JSON on stdout, and nothing else.
    """
    if out is None and not (print_recipe or dry_run):
        raise CutawayError("name the folder that the dictionaries go to: --out FOLDER (or look first: --dry-run)")
    if model:
        announce(model)
    elif module or store or recipe:
        say_loading(str(module or store or recipe))

    from cutaway.dictionaries.training.recipe import Recipe

    options: dict[str, Any] = _assignments(assign or [])
    if lr is not None:
        options["learning_rate"] = lr
    if low_precision:
        options["low_precision"] = True
    given = Recipe() if recipe is None else Recipe.read(recipe)
    if given.module is not None and module is None and store is None and model is None:
        raise CutawayError(
            f"{recipe} takes its model from a program, {given.module}: name it with --module too if it may run"
        )
    asked = given.changed(
        model=model,
        other=other,
        module=module,
        store=None if store is None else str(store),
        corpus=corpus,
        site=site,
        to=to,
        crosscoder=crosscoder,
        preset=preset,
        d_sae=d_sae,
        k=k,
        sparsity=sparsity,
        l0=l0,
        seed=seed,
        tokens=tokens,
        batch=batch,
        options=options or None,
        context=context,
        passes=passes,
        buffer_tokens=buffer_tokens,
        bos="keep" if keep_bos else None,
        first_position="keep" if keep_first else None,
        high_norm=high_norm,
        field=field,
        split=split,
        document_separator=document_separator,
        held_out=held_out,
        data_seed=data_seed,
    )

    from cutaway.dictionaries.training import api

    training = api.prepare(asked)
    names = [lm.name for lm in training.models]
    if print_recipe:
        print(training.recipe.to_toml(), end="")
        return
    if dry_run:
        from cutaway.dictionaries.training.estimate import estimate

        found = estimate(training)
        print_result(found.to_json(), model=names) if json else say(str(found))
        return
    assert out is not None
    done = api.run(training, out, log=log or (), resume=not overwrite)
    last = {name: dict(one.history[-1]) for name, one in done.items()}
    if json:
        if training.held_out is not None:
            _judged(training, done, out)
        print_result({"folder": str(out), "dictionaries": last}, model=names)
        return
    columns = ["dictionary", "variance explained", "L0", "dead", "tokens"]
    rows = [
        [
            name,
            f"{record['variance_explained']:.4f}",
            f"{record['l0']:.4g}",
            f"{record['dead'] / done[name].dictionary.d_sae:.1%}",
            f"{record['tokens']:,.0f}",
        ]
        for name, record in last.items()
    ]
    print_table(columns, rows)
    print(f"\nfolder: {out}  (figures are of the last batch that was trained on)")
    if training.held_out is not None:
        say(f"\n{_judged(training, done, out)}")


def _judged(training: "Training", done: "Mapping[str, Trained]", out: Path) -> "Frontier":
    """Judge what was trained on the rows that were kept out of it; seeds of one setting together."""
    from cutaway.artifacts.files import write_json, write_text
    from cutaway.artifacts.run_folder import recorded
    from cutaway.cli.dictionaries.judge import Judged, judge_page, line_of
    from cutaway.dictionaries.evaluation.frontier import frontier
    from cutaway.dictionaries.evaluation.judge import by_setting
    from cutaway.dictionaries.evaluation.judge import judge as judged_together

    assert training.held_out is not None
    models, rows = list(training.models), training.held_out
    found: list[Judged] = []
    for group in by_setting({name: one.dictionary for name, one in done.items()}):
        some = judged_together(models, list(group.values()), rows, spliced_rows=min(32, len(rows)))
        found.append(Judged(list(group), some))
    points = frontier([one.judgement.point(*line_of(one.judgement.dictionaries[0])) for one in found])
    source = f"{training.recipe.corpus}, kept out of training"
    with recorded(out):
        write_json(out / "judged.json", {"frontier": points, "judged": [one.judgement.to_json() for one in found]})
        write_text(out / "judged.html", judge_page(found, points, models, source))
    return points


def _assignments(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE as TOML; a value that is none is text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise CutawayError(f"--set {text}: write NAME=VALUE, such as warmup=500")
        try:
            found[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name.strip()] = value
    return found
