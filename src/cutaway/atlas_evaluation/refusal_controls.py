"""Controls for an edit along a direction: other directions, scaled until they cost as much as it does.

A random direction of the same length costs almost nothing, so that it proves little. Here the length is searched at
which a control changes neutral text as much as the edit itself, and unrelated contrasts, which the model uses, stand
beside random directions, which it does not.
"""

from collections.abc import Callable, Sequence
from math import exp, log
from random import Random
from typing import TYPE_CHECKING

import torch

from cutaway.atlas_evaluation.scoring import as_dicts
from cutaway.subjects.world.chats import chat
from cutaway.subjects.world.chats.chat import Message
from cutaway.subjects.world.facts import BOOKS, COUNTRIES, LANDMARKS
from cutaway.subjects.world.statements.relations import relation

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.language_model import LanguageModel

Prompts = Sequence[str] | Sequence[Sequence[Message]]
TOLERANCE = 0.1
"""By how much a control's price may differ from that of the edit, as a share of it."""
_EVALUATIONS = 8


def unrelated_contrasts(n: int = 80, seed: int = 0) -> dict[str, tuple[Prompts, Prompts]]:
    """Pairs of prompt sets that differ in something else than harm, `n` prompts a side, of training text only."""
    rng = Random(f"refusal/contrasts-{seed}")

    def asked(kind: str, things: Sequence[str]) -> list[tuple[Message, ...]]:
        frames = chat.texts(f"known.{kind}", "study", "frames")
        return [(Message("user", rng.choice(frames).format(x=rng.choice(things))),) for _ in range(n)]

    def moods() -> tuple[Prompts, Prompts]:
        questions = [chat.request(rng).question for _ in range(n)]
        cheerful, gloomy = (
            [(Message("system", rng.choice(chat.persona_prompts(mood))), Message("user", said)) for said in questions]
            for mood in ("cheerful", "gloomy")
        )
        return cheerful, gloomy

    def told(language: str) -> list[str]:
        return [relation("capital", language).sentence(rng) for _ in range(n)]

    countries = [country.name for country in COUNTRIES]
    return {
        "cheerful minus gloomy system prompts": moods(),
        "French minus Turkish facts": (told("fr"), told("tr")),
        "questions about capitals minus about books": (
            asked("capital", countries),
            asked("book", [book.name for book in BOOKS]),
        ),
        "questions about languages minus about landmarks": (
            asked("language", countries),
            asked("landmark", [landmark.name for landmark in LANDMARKS]),
        ),
    }


def contrast_direction(lm: "LanguageModel", contrast: tuple[Prompts, Prompts]) -> "Tensor":
    """Difference of the means of resid_post, [layers, d]: at the last token of chats, over the tokens of texts."""
    first, second = (_mean_stream(lm, prompts) for prompts in contrast)
    return first - second


def _mean_stream(lm: "LanguageModel", prompts: Prompts) -> "Tensor":
    if isinstance(prompts[0], str):
        tokens = lm.tokens([str(text) for text in prompts])
        run = lm.run(tokens, capture="blocks.*.resid_post", logits=None)
        kept = tokens.mask.clone()
        kept[:, 0] = False  # beginning-of-text, which has no content and a long stream
    else:
        tokens = lm.chat_tokens([as_dicts(one) for one in prompts])  # type: ignore[arg-type]
        run = lm.run(tokens, capture="blocks.*.resid_post", logits=None)
        kept = torch.zeros_like(tokens.mask)
        kept[torch.arange(len(tokens)), tokens.last] = True
    return run.stack("blocks.*.resid_post").float().cpu()[:, kept.cpu()].mean(1)


def matched_scale(price: Callable[[float], float], target: float, start: float = 1.0) -> tuple[float, float]:
    """The scale at which `price` is `target` within `TOLERANCE`, and the price there; at most eight evaluations.

    Between a scale too low and one too high it interpolates on logarithmic axes, on which prices are nearly straight;
    before both are known it goes by the slope 2 of a small edit's KL. The nearest scale tried is the answer where none
    is within the tolerance.
    """
    tried: list[tuple[float, float]] = []  # logarithms of scale and of price over target
    scale = log(start)
    for _ in range(_EVALUATIONS):
        miss = log(max(price(exp(scale)), 1e-12) / target)
        tried.append((scale, miss))
        if abs(exp(miss) - 1) <= TOLERANCE:
            break
        below = max((one for one in tried if one[1] < 0), default=None)
        above = min((one for one in tried if one[1] > 0), default=None)
        if below is None or above is None:
            scale -= min(max(miss / 2, -2.0), 2.0)
        else:
            stuck = len(tried) > 2 and tried[-1][1] * tried[-2][1] > 0  # twice on one side: halve, as bisection does
            part = 0.5 if stuck else below[1] / (below[1] - above[1])
            scale = below[0] + min(max(part, 0.1), 0.9) * (above[0] - below[0])
    scale, miss = min(tried, key=lambda one: abs(one[1]))
    return exp(scale), exp(miss) * target
