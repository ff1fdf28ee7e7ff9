"""`cutaway attribute`: which parts of a model write an answer?"""

import shlex
from pathlib import Path
from typing import Literal

from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import Count, Flag, Seed
from cutaway.cli.output import deliver


def attribute(
    model: str,
    /,
    *prompts: str,
    answer: list[str],
    wrong: list[str] | None = None,
    against: Literal["nothing", "mean"] = "nothing",
    by: Literal["component", "head", "neuron", "source"] = "component",
    method: Literal["dla"] = "dla",
    position: int = -1,
    top: Count = 16,
    ablate: int = 0,
    controls: Count = 16,
    seed: Seed = 0,
    dtype: str | None = None,
    device: str | None = None,
    json: Flag = False,
    html: Path | None = None,
) -> None:
    """Split the logit of an answer, or its lead over a wrong answer, into what each part of the model writes.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    prompts
        One prompt, or several to average over.
    answer
        A token with its leading space (“ Austin”), one for all prompts or one a prompt (--answer “ A” --answer “ B”).
    wrong
        The token that it is compared with; one for all prompts or one a prompt. With a single prompt, several are
        averaged.
    against
        What the answer is compared with where no --wrong is given: nothing, or the mean logit of the vocabulary.
    by
        Parts: component (attention and MLP of each layer), head, neuron, or source (each head's result, split over the
        tokens that it reads).
    method
        dla: direct logit attribution, which sums to the logit difference.
    position
        Whose next token is the answer: 0 is the first token, -1 the last.
    top
        How many parts to show.
    ablate
        Ablate so many of the largest parts one by one, and show what the answer really loses.
    controls
        How many random token pairs to measure each part with.
    seed
        Of the random token pairs and the parts drawn as controls.
    dtype
        float32, bfloat16 or float16; float32 on a CPU and the checkpoint's own on a GPU if not given.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the drawings to this file.
    """
    if not prompts:
        raise CutawayError("there is no prompt: cutaway attribute MODEL PROMPT --answer TOKEN")
    if wrong and against != "nothing":
        raise CutawayError("--wrong and --against say the same thing twice: give one of them")
    if ablate < 0:
        raise CutawayError(f"--ablate {ablate}: give 0 or more parts")

    import cutaway
    from cutaway.draw.page import page_html
    from cutaway.observe.attribution import attribute as measure
    from cutaway.observe.attribution_ablation import ablate_parts
    from cutaway.observe.attribution_view import attribution_sections, compared

    n = len(prompts)
    if len(answer) not in (1, n):
        raise CutawayError(f"{len(answer)} answers for {n} prompts: give one --answer, or one a prompt")
    if wrong and n > 1 and len(wrong) not in (1, n):
        raise CutawayError(f"{len(wrong)} wrong answers for {n} prompts: give one --wrong, or one a prompt")
    lm = cutaway.load(model, dtype=dtype, device=device)
    beside = None if against == "nothing" else against
    if wrong:
        beside = [wrong] if n == 1 else [[token] for token in (wrong * n if len(wrong) == 1 else wrong)]
    answers = answer * n if len(answer) == 1 else answer
    result = measure(lm, list(prompts), answers, beside, position=position, by=by, controls=controls, seed=seed)
    ablated = ablate_parts(lm, result, ablate, seed=seed) if ablate else []
    command = shlex.join(_command(model, prompts, answer, wrong, against, by, position, ablate))
    data = {"command": command, "method": method, **result.to_json(top if by in ("neuron", "source") else None)}
    if ablated:
        data["ablations"] = [
            {"part": one.part.name, "share": one.part.value, **one.effect.to_json()} for one in ablated
        ]
    text = result.table(top)
    if ablated:
        lines = ["", f"  {'mean-ablated alone':<34}{'share':>9}{'fall':>9}{'random parts':>14}"]
        for one in ablated:
            control = f"{one.effect.controls[0].value:>14.3f}" if one.effect.controls else f"{'':>14}"
            lines.append(f"  {one.part.name:<34}{one.part.value:>9.3f}{one.effect.value:>9.3f}{control}")
        text += "\n".join(lines)

    def page() -> str:
        lead = f"{lm.name}, {compared(result)}, after “{prompts[0]}”, by {by}."
        sections = attribution_sections(result, ablated, top)
        return page_html(title="Direct logit attribution", sections=sections, lead=lead, command=command)

    deliver(text=text, data=data, page=page, as_json=json, html=html)


def _command(
    model: str,
    prompts: tuple[str, ...],
    answer: list[str],
    wrong: list[str] | None,
    against: str,
    by: str,
    position: int,
    ablate: int,
) -> list[str]:
    words = ["cutaway", "attribute", model, *prompts]
    words += [word for token in answer for word in ("--answer", token)]
    words += [word for token in wrong or () for word in ("--wrong", token)]
    words += ["--against", against] if against != "nothing" else []
    words += ["--by", by] if by != "component" else []
    words += ["--position", str(position)] if position != -1 else []
    words += ["--ablate", str(ablate)] if ablate else []
    return words
