"""`cutaway saliency`: which tokens of a prompt matter to an answer, by the classical methods and their checks."""

from typing import Any, Literal

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import Count, DType, Flag, Page, Seed, announce, opened
from cutaway.cli.output import deliver


def saliency(
    model: str,
    /,
    *prompts: str,
    answer: list[str] | None = None,
    wrong: list[str] | None = None,
    method: list[Literal["gradient-x-input", "integrated-gradients", "occlusion"]] | None = None,
    baseline: Literal["zero", "pad", "mean", "delete"] = "mean",
    steps: Count | None = None,
    seeds: Count = 2,
    draws: Count = 20,
    dtype: DType = None,
    device: str | None = None,
    seed: Seed = 0,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Attribute an answer to the tokens of a prompt: gradient × input, integrated gradients, occlusion. Beside each
    stand the same map with randomised weights, what deleting its top tokens costs, and the other methods.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    prompts
        One prompt, or several.
    answer
        The token that each prompt goes on with, with its leading space (“ Austin”), or its id (“#422”): one for all
        prompts or one per prompt (--answer “ A” --answer “ B”); what the model would answer if
        not given.
    wrong
        The token whose logit is subtracted, likewise; “mean” for the mean over the vocabulary.
    method
        One of the three, and the option may be repeated; all three if not given.
    baseline
        What stands in for a token: zero, the padding token's embedding, the mean embedding; or delete, for occlusion.
    steps
        Points of the integral; as many as it needs, from 32 to 1024, if not given.
    seeds
        How many untrained models each map is compared with.
    draws
        How many random sets of tokens stand beside the deletion of the top ones.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    seed
        Of untrained weights and random tokens.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the tokens drawn to this file.
    """
    if not prompts:
        raise CutawayError("there is no prompt: cutaway saliency MODEL PROMPT --answer TOKEN")
    n = len(prompts)
    for what, given in (("answers", answer), ("wrong answers", wrong)):
        if given and len(given) not in (1, n):
            raise CutawayError(f"{len(given)} {what} for {n} prompts; give one, or one for each prompt.")

    announce(model)
    from cutaway.draw.page import page_html
    from cutaway.observe.attribution.answers import model_answers
    from cutaway.observe.saliency_maps.methods import METHODS
    from cutaway.observe.saliency_maps.report import SaliencyChecks, saliency_sections
    from cutaway.observe.saliency_maps.report import saliency as measure

    chosen: Any = tuple(dict.fromkeys(method)) if method else METHODS
    lm = opened(model, dtype=dtype, device=device)
    answers: Any = model_answers(lm, list(prompts)) if not answer else answer * n if len(answer) == 1 else answer
    report = measure(
        lm,
        list(prompts),
        answers,
        wrong * n if wrong and len(wrong) == 1 else wrong,
        methods=chosen,
        baseline=baseline,
        steps=steps,
        checks=SaliencyChecks(untrained_models=seeds, draws=draws, seed=seed),
    )

    def page() -> str:
        about = "What each token of a prompt adds to an answer in"
        return page_html(
            title=f"Saliency in {report.model}: " + (f"“{prompts[0]}”" if n == 1 else f"{n} prompts"),
            lead=f"{about} {report.model}, by methods that look at inputs alone.",
            sections=saliency_sections(report),
            command=current_command(),
        )

    deliver(text=str(report), model=lm.name, figures=report.to_json(), page=page, as_json=json, html=html)
