"""`cutaway lens`: what would each layer say, and how does it come to the answer?"""

from pathlib import Path
from typing import Any, Literal

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import (
    Count,
    DType,
    Flag,
    ModuleFile,
    Page,
    Seed,
    Separator,
    announce,
    model_and_prompt,
    opened,
)
from cutaway.cli.output import deliver

_WORLD_CHARACTERS = 6_000_000


def lens(
    model: str | None = None,
    prompt: str | None = None,
    /,
    *,
    target: list[str] | None = None,
    position: list[int] | None = None,
    top: Count = 5,
    mid: Flag = False,
    tuned: Path | None = None,
    train: str | None = None,
    document_separator: Separator = None,
    out: Path | None = None,
    steps: Count = 250,
    batch: Count = 4096,
    context: Count = 128,
    optimizer: Literal["sgd", "adam"] = "sgd",
    lr: float | None = None,
    held_out: Count = 64,
    seed: Seed = 0,
    overwrite: Flag = False,
    module: ModuleFile = None,
    dtype: DType = None,
    device: str | None = None,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Read each layer's stream through the unembedding (logit lens), or through trained translators (tuned lens).

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    prompt
        What to read; may be left out when a tuned lens is trained.
    target
        A token to follow through the layers, with its leading space (“ Austin”) or as its id (“#422”); may be given
        several times. The model's own answer if not given.
    position
        A token position to read (0 is the first, -1 the last); may be given several times. All if not given; the
        table shows the last one read.
    top
        How many tokens to show at each layer.
    mid
        Read the stream between attention and MLP too.
    tuned
        Folder of a tuned lens: one that --train wrote, or one of the tuned-lens library's.
    train
        Train a tuned lens on this text file, or folder of them; “world” is text of atlas's world. The same command
        goes on with a training that was interrupted.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    out
        Folder for the trained lens; needed with --train.
    steps
        Steps of training.
    batch
        Tokens in a step of training. The paper takes 262,144; a small model is content with less.
    context
        Tokens in a row of the training text.
    optimizer
        sgd (Nesterov momentum 0.9, the paper's) or adam.
    lr
        1.0 for sgd and 0.001 for adam if not given; it falls linearly to 0.
    held_out
        Rows of the text that are kept from training, to judge the lens on.
    seed
        Of the order of the text and of what is held out.
    overwrite
        Begin again in a folder that holds another training.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the drawings to this file.
    """
    model, prompt = model_and_prompt(model, prompt, module)
    if train is None and document_separator is not None:
        raise CutawayError("--document-separator is of the text that --train reads: give that too")
    if prompt is None and train is None:
        raise CutawayError("there is nothing to read: give a prompt, or a text with --train")
    if train is not None and out is None:
        raise CutawayError("a tuned lens is written into a folder: name it with --out")
    if train is not None and tuned is not None:
        raise CutawayError("--train makes a tuned lens and --tuned reads one: give one of them")
    if mid and (tuned is not None or train is not None):
        raise CutawayError("a tuned lens has no translators between attention and MLP: leave --mid out")
    announce(model, module)

    from cutaway.draw.page import page_html
    from cutaway.model.naming import single_token
    from cutaway.observe.lens.evaluation import evaluation_section
    from cutaway.observe.lens.files import load_tuned_lens
    from cutaway.observe.lens.logit_lens import logit_lens
    from cutaway.observe.lens.view import lens_sections

    lm = opened(model, module, dtype=dtype, device=device)
    evaluation = translators = None
    data: dict[str, Any] = {}
    texts: list[str] = []
    if tuned is not None:
        translators = load_tuned_lens(tuned)
        translators.check(lm)
    if train is not None:
        assert out is not None
        options = {
            "steps": steps,
            "tokens_per_step": batch,
            "optimizer": optimizer,
            "learning_rate": lr,
            "seed": seed,
        }
        translators, evaluation = _train(lm, train, out, options, context, held_out, overwrite, document_separator)
        data["evaluation"] = evaluation.to_json()
        texts.append(f"{evaluation}\n  lens: {out}")
    plain = read = None
    if prompt is not None:
        follow = [single_token(lm, token, "target") for token in target or ()]
        sites = ["blocks.0.resid_pre", "blocks.*.resid_mid", "blocks.*.resid_post"] if mid else None
        if not follow:
            at = position[-1] if position else -1
            answer = logit_lens(lm, prompt, 1, positions=at)
            follow = [int(answer.top_ids[-1, 0, 0, 0])]
        options = {"positions": position, "follow": follow}
        plain = logit_lens(lm, prompt, top, sites=sites, **options)
        data["logit_lens"] = plain.to_json()
        texts.append(plain.table())
        if translators is not None:
            read = logit_lens(lm, prompt, top, tuned=translators, **options)
            data["tuned_lens"] = read.to_json()
            texts.append(read.table())

    def page() -> str:
        sections = lens_sections(data["logit_lens"], data.get("tuned_lens")) if plain is not None else []
        sections += [evaluation_section(evaluation)] if evaluation is not None else []
        title = f"Lens of {lm.name}" + (f": “{prompt}”" if prompt is not None else ", tuned")
        return page_html(title=title, sections=sections, command=current_command())

    deliver(text="\n\n".join(texts), model=lm.name, figures=data, page=page, as_json=json, html=html)


def _train(
    lm: Any,
    corpus: str,
    out: Path,
    options: dict[str, Any],
    context: int,
    held_out: int,
    overwrite: bool,
    document_separator: str | None,
) -> tuple[Any, Any]:
    """Train in a run folder (which resumes and keeps others out), judge on held-out rows, write the lens."""
    from cutaway.artifacts.run_folder import RunFolder
    from cutaway.data.corpus.corpus import read_corpus, rows_hash, split_rows, token_rows
    from cutaway.data.corpus.separators import refuse_separator
    from cutaway.data.tasks.registry import world_text
    from cutaway.observe.lens.evaluation import evaluate_lens
    from cutaway.observe.lens.files import MANIFEST, TENSORS, save_tuned_lens
    from cutaway.observe.lens.tuned_lens import CHECKPOINT, TunedLensConfig, train_tuned_lens

    config = TunedLensConfig(**options)
    if corpus == "world":
        refuse_separator(document_separator, "text of atlas's world")
        documents = world_text("atlas", _WORLD_CHARACTERS, f"lens-{config.seed}")
    else:
        documents = read_corpus(corpus, document_separator=document_separator).documents
    context = min(context, lm.context_length)
    most = held_out + config.steps * max(1, round(config.tokens_per_step / context))
    split = split_rows(token_rows(lm, documents, context, config.seed, limit=most), held_out, config.seed)
    config.rows_per_step(split.train)
    configuration = {
        **options,
        "model": lm.identity().weight_hash,
        "train": rows_hash(split.train),
        "held_out": rows_hash(split.held_out),
    }
    writes = (CHECKPOINT, TENSORS, MANIFEST)
    with RunFolder.open(
        out, command="lens", configuration=configuration, writes=writes, resume=not overwrite
    ) as folder:
        lens = train_tuned_lens(lm, split.train, config, folder=folder.path)
        evaluation = evaluate_lens(lm, lens, split.held_out)
        save_tuned_lens(lens, folder.path, evaluation=evaluation)
    return lens, evaluation
