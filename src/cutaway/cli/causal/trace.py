"""`cutaway trace`: which states bring a fact back once noise has hidden its subject?"""

from pathlib import Path
from typing import TYPE_CHECKING

from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import Count, DType, ExistingPath, Flag, Page, Seed, announce, opened
from cutaway.cli.output import deliver

if TYPE_CHECKING:
    from cutaway.causal.tracing.prompts import FactPrompt


def trace(
    model: str,
    prompt: str | None = None,
    /,
    *,
    subject: str | None = None,
    answer: str | None = None,
    prompts: ExistingPath | None = None,
    n: Count = 24,
    noise: float = 3.0,
    draws: Count = 10,
    window: Count | None = None,
    dtype: DType = None,
    device: str | None = None,
    seed: Seed = 0,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Causal tracing: hide the subject of a fact behind noise, put back one clean state, attention or MLP output at a
    time, and see how much of the answer's probability comes back. Without prompts: where landmarks are.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    prompt
        The text that the fact's answer follows, such as “The capital of the state containing Dallas is”.
    subject
        The text in the prompt that is hidden (“Dallas”).
    answer
        The right answer with its leading space (“ Austin”), or a token's id (“#422”); the model's own guess, right or
        wrong, if not given.
    prompts
        Instead of these three, a JSON file: a list of objects with prompt, subject and answer.
    n
        Trace the first so many of the prompts that the model answers rightly, or that have no answer.
    noise
        Standard deviation of the noise, in standard deviations of the subjects' token embeddings.
    draws
        Draws of the noise for each prompt.
    window
        Neighbouring layers whose attention or MLP outputs are put back together; a quarter of the layers, at most 10,
        if not given.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    seed
        Of the noise.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the heatmaps to this file.
    """
    if prompts is not None and (prompt or subject or answer):
        raise CutawayError("--prompts has its own subjects and answers: leave the prompt, --subject and --answer out")
    if (prompt is None) != (subject is None) or (answer is not None and prompt is None):
        raise CutawayError("a fact needs a prompt and --subject, the text in it that is to be hidden")
    if not noise > 0:
        raise CutawayError(f"--noise {noise:g} hides nothing; give more than 0 standard deviations")

    announce(model)
    from cutaway.causal.tracing.prompts import FactPrompt
    from cutaway.causal.tracing.trace import causal_trace
    from cutaway.causal.tracing.view import trace_page

    if prompts is not None:
        facts = read_facts(prompts)
    elif prompt is not None and subject is not None:
        facts = [FactPrompt(prompt, subject, answer)]
    else:
        facts = landmark_facts()
    lm = opened(model, dtype=dtype, device=device)
    found = causal_trace(lm, facts, noise=noise, draws=draws, window=window, limit=n, seed=seed)
    deliver(
        text=str(found),
        model=lm.name,
        figures=found.to_json(),
        page=lambda: trace_page(found),
        as_json=json,
        html=html,
    )


def landmark_facts() -> "list[FactPrompt]":
    """In which city the landmarks of atlas's world are, which are those of ours."""
    from cutaway.causal.tracing.prompts import FactPrompt
    from cutaway.data.tasks.registry import world_facts

    return [FactPrompt(*fact) for fact in world_facts()]


def read_facts(path: Path) -> "list[FactPrompt]":
    """The prompts of a JSON file. Raises CutawayError that names what is wrong with it."""
    from cutaway.artifacts.files import read_json
    from cutaway.causal.tracing.prompts import FactPrompt

    if path.is_dir():
        raise CutawayError(f"{path} is a folder; --prompts takes a JSON file")
    data = read_json(path)
    if not isinstance(data, list) or not data:
        raise CutawayError(f'{path} holds no list of objects like {{"prompt": ..., "subject": ..., "answer": ...}}')
    return [FactPrompt.from_json(one, f"prompt {i} of {path}") for i, one in enumerate(data)]
