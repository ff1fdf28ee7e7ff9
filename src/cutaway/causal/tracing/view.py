"""Causal tracing as a page: three heatmaps that say in words what a cell is."""

from markupsafe import Markup

from cutaway.artifacts.command import current_command
from cutaway.causal.tracing.grid import HEADINGS, SITES, CausalTrace, TraceKind
from cutaway.draw.charts import effect_html
from cutaway.draw.page import page_html
from cutaway.draw.panels import table_html


def trace_page(trace: CausalTrace) -> str:
    """The whole page: what the noise takes, and what each restored value brings back."""
    single, total = trace.n == 1, trace.total_effect()
    fact = trace.facts[0]
    whose = "" if fact.answer is not None else "the model's own guess: "
    about = f"after “{fact.prompt}” ({whose}{trace.answers[0].strip()})" if single else f"over {trace.which}"
    answer = "right answer" if not trace.guessed else "model's own guess" if trace.guessed == trace.n else "answer"
    sections: list[tuple[str, str, Markup]] = [
        (
            "What the noise takes",
            f"The {answer} has probability {trace.clean.mean():.3f}, and {trace.noised.mean():.3f} when the token "
            f"embeddings of the subject have gaussian noise of {trace.multiple:g} standard deviations (one is "
            f"{trace.sigma:.4g}) on them; mean over {trace.draws} draws. Below, one clean value at a time is put back.",
            effect_html(total) if total.controls else Markup(""),
        )
    ]
    sections += [(HEADINGS[kind], _reading(trace, kind, single), trace.heatmap(kind)) for kind in SITES]
    rows = [
        [
            fact.prompt,
            fact.subject,
            f"{said.strip()}{' (guess)' * (fact.answer is None)}",
            f"{clean:.3f}",
            f"{noised:.3f}",
        ]
        for fact, said, clean, noised in zip(
            trace.facts, trace.answers, trace.clean.tolist(), trace.noised.tolist(), strict=True
        )
    ]
    about_prompts = [
        *(["Prompts whose right answer is the model's most probable token."] if trace.guessed < trace.n else []),
        *(["Prompts without an answer are traced by the model's guess, right or wrong."] if trace.guessed else []),
        *([f"{len(trace.refused)} more are left out: the model answers them otherwise."] if trace.refused else []),
    ]
    sections.append(
        (
            "The prompts",
            " ".join(about_prompts),
            table_html(
                columns=["prompt", "subject", "answer", "P plain", "P with noise"],
                rows=rows,
                title="prompts",
                align=["left", "left", "left", "right", "right"],
            ),
        )
    )
    title = f"Causal tracing of {trace.model}: " + (f"“{fact.prompt}”" if single else f"{trace.n} prompts")
    lead = f"Which states of {trace.model} bring a fact back once noise has hidden its subject, {about}."
    return page_html(title=title, lead=lead, sections=sections, command=current_command())


def _reading(trace: CausalTrace, kind: TraceKind, single: bool) -> str:
    """How to read one heatmap."""
    if kind == "state":
        what = f"{SITES[kind]} of one layer at one token"
    else:
        what = f"{SITES[kind]} at one token in {trace.window} neighbouring layers (around the row's)"
    mean = (
        ""
        if single
        else " The mean is over prompts; a prompt without such a token is left out of its column. Against a random "
        f"other position {trace.discoveries(kind)}: of so many one in twenty is expected to be false."
    )
    return (
        f"A cell is the probability that comes back when {what} gets its clean value, the subject still hidden: 0 is "
        f"nothing, {trace.total_effect().value:.2f} would be all that the noise took, below 0 it gets worse.{mean}"
    )
