"""`cutaway attribute`: which parts of a model write an answer?"""

from pathlib import Path
from typing import Any, Literal

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import Count, DType, ExistingPath, Flag, Page, Seed, Separator, announce, opened
from cutaway.cli.output import deliver

_REFERENCE_ROWS, _REFERENCE_TOKENS = 32, 64


def attribute(
    model: str,
    /,
    *prompts: str,
    answer: list[str] | None = None,
    wrong: list[str] | None = None,
    against: Literal["nothing", "mean"] = "nothing",
    by: Literal["component", "head", "neuron", "source"] = "component",
    position: int = -1,
    top: Count = 16,
    ablate: int = 0,
    reference: ExistingPath | None = None,
    document_separator: Separator = None,
    draws: Count = 16,
    seed: Seed = 0,
    dtype: DType = None,
    device: str | None = None,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Split the logit of an answer, or its lead over a wrong answer, into what each part of the model writes.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    prompts
        One prompt, or several to average over.
    answer
        The token that each prompt goes on with, with its leading space (“ Austin”), or its id (“#422”): one for all
        prompts or one per prompt (--answer “ A” --answer “ B”); what the model itself says if not given.
    wrong
        The token that it is compared with; one for all prompts or one per prompt. With a single prompt, several are
        averaged.
    against
        What the answer is compared with where no --wrong is given: nothing, or the mean logit of the vocabulary.
    by
        Parts: component (attention and MLP of each layer), head, neuron, or source (each head's result, split over the
        tokens that it reads).
    position
        Whose next token is the answer: 0 is the first token, -1 the last.
    top
        How many parts to show.
    ablate
        Replace so many of the largest parts one by one by their mean, and show what the answer really loses.
    reference
        A text file, or a folder of them, over which these means are taken; the prompts themselves if not given.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    draws
        How many random token pairs to measure each part with.
    seed
        Of the random token pairs and the parts drawn as controls.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the drawings to this file.
    """
    if not prompts:
        raise CutawayError("there is no prompt: cutaway attribute MODEL PROMPT")
    if wrong and against != "nothing":
        raise CutawayError("--wrong and --against say the same thing twice: give one of them")
    if document_separator is not None and reference is None:
        raise CutawayError("--document-separator is of the text that --reference names: give that too")
    if ablate < 0:
        raise CutawayError(f"--ablate {ablate}: give 0 or more parts")

    n = len(prompts)
    if answer and len(answer) not in (1, n):
        raise CutawayError(f"{len(answer)} answers for {n} prompts: give one --answer, or one per prompt")
    if wrong and n > 1 and len(wrong) not in (1, n):
        raise CutawayError(f"{len(wrong)} wrong answers for {n} prompts: give one --wrong, or one per prompt")
    announce(model)

    from cutaway.draw.page import page_html
    from cutaway.observe.attribution.ablation import ablate_parts, ablations_section
    from cutaway.observe.attribution.answers import model_answers
    from cutaway.observe.attribution.attribution import attribute as measure
    from cutaway.observe.attribution.results import attribution_sections, compared

    lm = opened(model, dtype=dtype, device=device)
    beside = None if against == "nothing" else against
    if wrong:
        beside = [wrong] if n == 1 else [[token] for token in (wrong * n if len(wrong) == 1 else wrong)]
    answers = answer or model_answers(lm, list(prompts), position)
    answers = answers * n if len(answers) == 1 else answers
    result = measure(lm, list(prompts), answers, beside, position=position, by=by, controls=draws, seed=seed)
    means = None if reference is None else _reference(lm, reference, seed, document_separator)
    ablated = ablate_parts(lm, result, ablate, reference=means, seed=seed) if ablate else ()
    figures = result.to_json(top if by in ("neuron", "source") else None)
    if ablated:
        figures["ablations"] = ablated.to_json()
    text = result.table(top)
    if ablated:
        lines = ["", f"  {'mean-ablated alone':<34}{'share':>9}{'fall':>9}{'random parts':>14}"]
        for one in ablated:
            control = f"{one.effect.controls[0].value:>14.3f}" if one.effect.controls else f"{'':>14}"
            lines.append(f"  {one.part.name:<34}{one.part.value:>9.3f}{one.effect.value:>9.3f}{control}")
        text += "\n".join(lines)

    def page() -> str:
        lead = f"{lm.name}, {compared(result)}, after “{prompts[0]}”, by {by}."
        sections = attribution_sections(result, top) + ([ablations_section(ablated)] if ablated else [])
        return page_html(title="Direct logit attribution", sections=sections, lead=lead, command=current_command())

    deliver(text=text, model=lm.name, figures=figures, page=page, as_json=json, html=html)


def _reference(lm: Any, path: Path, seed: int, document_separator: str | None) -> list[list[int]]:
    """Rows of tokens of a corpus, enough for a mean."""
    from cutaway.data.corpus.corpus import read_corpus, token_rows

    documents = read_corpus(path, document_separator=document_separator).documents
    return token_rows(lm, documents, min(_REFERENCE_TOKENS, lm.context_length), seed, limit=_REFERENCE_ROWS).tolist()
