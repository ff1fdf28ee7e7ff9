"""Contrasts of prompts that have nothing to do with refusal: directions that the model uses, as controls.

Random directions, which it does not use, prove little beside them. Both are scaled until they have the side effects of
the edit itself (`cutaway.steering.controls`).
"""

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from cutaway.atlas_evaluation.scoring import as_dicts
from cutaway.steering.directions import read_positions
from cutaway.subjects.world.chats import chat
from cutaway.subjects.world.chats.chat import Message
from cutaway.subjects.world.facts import BOOKS, COUNTRIES, LANDMARKS
from cutaway.subjects.world.statements.relations import relation

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.language_model import LanguageModel

Prompts = Sequence[str] | Sequence[Sequence[Message]]


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
    if not isinstance(prompts[0], str):
        tokens = lm.chat_tokens([as_dicts(one) for one in prompts])  # type: ignore[arg-type]
        return read_positions(lm, tokens, "blocks.*.resid_post", (-1,))[-1].mean(1)
    tokens = lm.tokens([str(text) for text in prompts])
    kept = tokens.mask.clone()
    kept[:, 0] = False  # beginning-of-text, which has no content and a long stream
    run = lm.run(tokens, capture="blocks.*.resid_post", logits=None)
    return run.stack("blocks.*.resid_post").float()[:, kept].mean(1).cpu()
