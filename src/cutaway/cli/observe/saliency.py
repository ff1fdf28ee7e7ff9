"""`cutaway saliency`: which tokens of a prompt matter to an answer, by the classical methods and their checks."""

from typing import TYPE_CHECKING, Any, Literal

from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import Count, Flag, Page, Seed
from cutaway.cli.output import command_line, deliver

if TYPE_CHECKING:
    from cutaway.observe.saliency_maps.report import SaliencyReport


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
    dtype: str | None = None,
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
    dtype
        float32, bfloat16 or float16; float32 on a CPU and the checkpoint's own on a GPU if not given.
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

    import cutaway
    from cutaway.observe.attribution.answers import model_answers
    from cutaway.observe.saliency_maps.methods import METHODS
    from cutaway.observe.saliency_maps.report import saliency as measure

    chosen: Any = tuple(dict.fromkeys(method)) if method else METHODS
    command = command_line(
        "saliency",
        model,
        *prompts,
        answer=(answer, None),
        wrong=(wrong, None),
        method=(method, None),
        baseline=(baseline, "mean"),
        steps=(steps, None),
        seeds=(seeds, 2),
        draws=(draws, 20),
        seed=(seed, 0),
    )
    lm = cutaway.load(model, dtype=dtype, device=device)
    answers: Any = model_answers(lm, list(prompts)) if not answer else answer * n if len(answer) == 1 else answer
    report = measure(
        lm,
        list(prompts),
        answers,
        wrong * n if wrong and len(wrong) == 1 else wrong,
        methods=chosen,
        baseline=baseline,
        steps=steps,
        seeds=seeds,
        draws=draws,
        seed=seed,
        command=command,
    )
    deliver(
        text=str(report),
        data={"command": command, **report.to_json()},
        page=lambda: saliency_page(report, command),
        as_json=json,
        html=html,
    )


def saliency_page(report: "SaliencyReport", command: str) -> str:
    """Tokens tinted by attribution, method by method, with the sanity check, the deletion test and agreement."""
    from markupsafe import Markup

    from cutaway.draw.charts import effect_html
    from cutaway.draw.page import page_html
    from cutaway.draw.panels import table_html
    from cutaway.draw.tokens import TokenRow, tokens_html, tokens_scale

    sections: list[tuple[str, str, Markup]] = []
    for one in report.methods:
        rows: list[TokenRow] = []
        for found in one.maps:
            gap = "" if found.gap is None else f"; the sum is off by {found.gap:+.2g} with {found.steps} steps"
            rows.append(
                {
                    "tokens": found.tokens,
                    "values": found.values.tolist(),
                    "label": f"{found.what}: {found.value:.2f}",
                    "detail": f"sum over tokens {found.values.sum():.2f}{gap}",
                }
            )
        scale = tokens_scale(rows)
        stages = table_html(
            columns=["given new random weights", "rank correlation", "of magnitudes"],
            rows=[[s.randomised, f"{s.signed:+.2f}", f"{s.magnitude:+.2f}"] for s in one.stages],
            title=f"{one.method} under randomised weights",
        )
        baseline = one.maps[0].baseline
        name = one.method.replace("-x-", " × ").replace("-", " ")
        sections.append(
            (
                name + (f" (baseline: {baseline})" if baseline else ""),
                f"What it does not show: {one.not_shown}",
                scale.legend("logits") + tokens_html(rows=rows, units="logits", scale=scale),
            )
        )
        sections.append(
            (
                f"{name}: would it look the same without training?",
                "Rank correlation between the map and the same prompt's map after layers got new random weights, from "
                "the top down, and at last everything. Near 1 means that the map is not about what was learned. With "
                f"{len(one.maps[0].tokens)} tokens, unrelated maps differ from 0 by about "
                f"{1 / max(1, len(one.maps[0].tokens) - 1) ** 0.5:.2f}.",
                stages + Markup("<p>{}</p>").format("Taking away the tokens that it ranks highest:")
                + effect_html(one.deletion.to_json()),
            )
        )  # fmt: skip
    if report.agreement:
        rows_of = [[a, b, f"{value:+.2f}"] for (a, b), value in report.agreement.items()]
        sections.append(
            (
                "Do the methods agree?",
                "Rank correlation between two methods' maps of the same prompt.",
                table_html(columns=["method", "and", "rank correlation"], rows=rows_of, title="agreement"),
            )
        )
    return page_html(
        title="Saliency",
        lead=f"What each token of a prompt adds to an answer in {report.model}, by methods that look at inputs alone.",
        sections=sections,
        command=command,
    )
