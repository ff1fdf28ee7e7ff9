"""Clamping one latent of a dictionary, over a range of doses, beside latents of like density at the same dose.

Rows of W_dec have length 1, so every latent clamped to a value moves the stream by about as much: the random latents
are controls of matched norm. The edit adds to the stream and leaves the dictionary's error alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit, clamp_latent
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.steering.side_effects import SideEffects, side_effects_of_each


def similar_latents(density: Tensor, latent: int, k: int, seed: int = 0, without: Sequence[int] = ()) -> list[int]:
    """k random latents out of the 50 whose density is nearest to this one's (on a log scale), never this one.

    Args:
        density: Share of tokens on which each latent is active [F].
        latent: The latent that they are a control for.
        k: How many.
        seed: Of the draw.
        without: Latents that are not drawn.
    """
    banned = {latent, *without}
    live = [i for i in (density > 0).nonzero()[:, 0].tolist() if i not in banned]
    if len(live) < k:
        raise CutawayError(f"only {len(live)} other latents are active, too few to draw {k} as a control")
    at = float(density[latent].clamp(min=float(density[density > 0].min())).log())
    nearest = sorted(live, key=lambda i: abs(float(density[i].log()) - at))[: max(50, k)]
    return [nearest[i] for i in np.random.default_rng(seed).choice(len(nearest), size=k, replace=False)]


@dataclass(frozen=True)
class Concept:
    """What is watched: the next-token probability of some tokens together.

    Attributes:
        ids: Token ids, such as the first tokens of the concept's names.
        name: The concept in words.
    """

    ids: tuple[int, ...]
    name: str = "the concept"


@dataclass(frozen=True)
class Doses:
    """The values that a latent is clamped to.

    Attributes:
        maximum: Its largest activation in a corpus.
        multiples: Multiples of it.
    """

    maximum: float
    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class SimilarLatents:
    """Control latents, drawn from those of like density (`similar_latents`).

    Attributes:
        density: Share of tokens on which each latent is active [F].
        draws: How many are drawn.
        seed: Of the draw.
    """

    density: Tensor
    draws: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Dose:
    """One dose of a latent.

    Attributes:
        multiple: The value as a multiple of the latent's maximum in the corpus.
        value: The activation that it is held at.
        effect: The concept's next-token probability, mean over prompts, beside unsteered and random latents at the same
            value.
        side_effects: On neutral text; None without any.
        random_kl: The KL on it of two random latents, nats per token.
        text: A greedy continuation of the first prompt.
        random_text: The same under the first random latent.
    """

    multiple: float
    value: float
    effect: Effect
    side_effects: SideEffects | None
    random_kl: float | None
    text: str
    random_text: str

    def to_json(self) -> dict[str, Any]:
        """The dose as plain data."""
        return {
            "multiple": self.multiple,
            "value": self.value,
            "effect": self.effect.to_json(),
            "side_effects": None if self.side_effects is None else self.side_effects.to_json(),
            "random_kl": self.random_kl,
            "text": self.text,
            "random_text": self.random_text,
        }


@dataclass(frozen=True, repr=False)
class LatentSteering(Result):
    """A dose curve of one latent.

    Attributes:
        latent: The latent.
        concept: What is watched, in words.
        prompts: The prompts.
        unsteered_text: A greedy continuation of the first prompt, unsteered.
        random_latents: The control latents.
        doses: What each dose did.
    """

    title = "Steering one latent"

    latent: int
    concept: str
    prompts: tuple[str, ...]
    unsteered_text: str
    random_latents: tuple[int, ...]
    doses: tuple[Dose, ...]

    @property
    def moved(self) -> Dose | None:
        """The dose with the largest effect whose interval lies above its random latents'; None for a null result."""
        above = [
            dose
            for dose in self.doses
            if dose.effect.interval is not None and dose.effect.interval[0] > _top(dose.effect.controls)
        ]
        return max(above, key=lambda dose: dose.effect.value) if above else None

    def to_json(self) -> dict[str, Any]:
        """Every dose as plain data."""
        return {
            "latent": self.latent,
            "concept": self.concept,
            "prompts": list(self.prompts),
            "unsteered_text": self.unsteered_text,
            "random_latents": list(self.random_latents),
            "doses": [dose.to_json() for dose in self.doses],
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per dose."""
        return [
            {
                "latent": self.latent,
                "multiple": dose.multiple,
                "value": dose.value,
                "probability": dose.effect.value,
                "low": (dose.effect.interval or (None, None))[0],
                "high": (dose.effect.interval or (None, None))[1],
                "n": dose.effect.n,
                "unsteered": dose.effect.controls[0].value,
                "random": dose.effect.controls[1].value,
                "kl": None if dose.side_effects is None else dose.side_effects.kl,
                "random_kl": dose.random_kl,
            }
            for dose in self.doses
        ]

    def summary(self) -> str:
        """The concept's probability at each dose, beside its controls."""
        lines = [f"latent {self.latent} clamped, P({self.concept}) over {len(self.prompts)} prompts"]
        for dose in self.doses[:11]:
            cost = "" if dose.side_effects is None else f", KL {dose.side_effects.kl:.2f} (random {dose.random_kl:.2f})"
            controls = ", ".join(f"{c.name} {c.value:.3f}" for c in dose.effect.controls)
            lines.append(f"  ×{dose.multiple:<4g} {dose.effect.figure()} ({controls}){cost}")
        return "\n".join(lines)

    def drawing(self) -> Markup:
        """The probability by dose, beside that under random latents."""
        from cutaway.draw.charts import Series, line_legend, line_svg, line_table

        x = [dose.multiple for dose in self.doses]
        ends = [dose.effect.interval or (None, None) for dose in self.doses]
        series: list[Series] = [
            {
                "name": "latent clamped",
                "x": x,
                "y": [dose.effect.value for dose in self.doses],
                "low": [low for low, _ in ends],
                "high": [high for _, high in ends],
            },
            {
                "name": self.doses[0].effect.controls[1].name,
                "x": x,
                "y": [dose.effect.controls[1].value for dose in self.doses],
                "control": True,
            },
        ]
        drawn = line_svg(
            series=series,
            title=f"P({self.concept}) by dose",
            x_label="multiple of the latent's largest activation",
            y_label=f"P({self.concept})",
        )
        return line_legend(series) + drawn + line_table(series, "multiple of the largest activation")

    def __str__(self) -> str:
        return self.summary()


def _top(controls: Sequence[Control]) -> float:
    ends = [control.interval[1] if control.interval is not None else control.value for control in controls]
    return max(end for end in ends if end == end)


def steer_latent(
    lm: LanguageModel,
    dictionary: Dictionary,
    latent: int,
    prompts: Inputs,
    concept: Concept,
    *,
    doses: Doses,
    controls: SimilarLatents,
    neutral: Inputs | None = None,
    positions: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 20,
) -> LatentSteering:
    """Clamp a latent at several multiples of its corpus maximum and watch the probability of a concept's tokens.

    Args:
        lm: The model.
        dictionary: A dictionary of one of its sites.
        latent: Which latent.
        prompts: Prompts at whose end the concept's tokens are watched, their probabilities summed.
        concept: The tokens that are watched.
        doses: The values that the latent is clamped to.
        controls: Random latents of like density, clamped to the same value.
        neutral: Text on which every dose's side effects are measured (clamped at every token).
        positions: A list for each prompt: the latent is clamped only there, for instance at a noun that may stand for
            the concept. By default at every token, new ones too.
        max_new_tokens: Of the greedy continuation of the first prompt.

    Raises:
        CutawayError: No tokens to watch; too few latents of like density.
        NotSupported: A dictionary whose latents cannot be clamped (`cutaway.clamp_latent`).
    """
    tokens = lm.tokens(prompts)
    ids = torch.tensor(sorted(set(concept.ids)))
    if len(ids) == 0:
        raise CutawayError("no tokens were given for the concept, so nothing can be watched")
    others = similar_latents(controls.density, latent, controls.draws, controls.seed)
    at = None if positions is None else [list(row) for row in positions]
    at_first = None if at is None else at[:1]
    plain = _probability(lm, tokens, (), ids)
    first = tokens[[0]]
    measured = []

    def say(which: int, value: float) -> str:
        edit = clamp_latent(dictionary, which, value, positions=at_first)
        return lm.generate(first, max_new_tokens=max_new_tokens, edits=edit).texts[0]

    for multiple in doses.multiples:
        value = multiple * doses.maximum
        steered = _probability(lm, tokens, clamp_latent(dictionary, latent, value, positions=at), ids)
        control = [
            _probability(lm, tokens, clamp_latent(dictionary, other, value, positions=at), ids).mean().item()
            for other in others
        ]
        effect = Effect(
            name=f"latent {latent} at ×{multiple:g}: P({concept.name})",
            value=steered.mean().item(),
            n=len(steered),
            interval=bootstrap_interval(steered.numpy()),
            controls=(
                Control("unsteered", plain.mean().item(), bootstrap_interval(plain.numpy()), len(plain)),
                Control(
                    f"{controls.draws} random latents of like density",
                    float(np.mean(control)),
                    bootstrap_interval(control),
                    controls.draws,
                ),
            ),
            ablation="clamp latent",
            units="probability",
        )
        costs = (
            []
            if neutral is None
            else side_effects_of_each(lm, neutral, [clamp_latent(dictionary, i, value) for i in (latent, *others[:2])])
        )
        measured.append(
            Dose(
                multiple=multiple,
                value=value,
                effect=effect,
                side_effects=costs[0] if costs else None,
                random_kl=float(np.mean([cost.kl for cost in costs[1:]])) if costs else None,
                text=say(latent, value),
                random_text=say(others[0], value),
            )
        )
    return LatentSteering(
        latent=latent,
        concept=concept.name,
        prompts=tuple(tokens.text(row) for row in range(len(tokens))),
        unsteered_text=lm.generate(first, max_new_tokens=max_new_tokens).texts[0],
        random_latents=tuple(others),
        doses=tuple(measured),
    )


def _probability(lm: LanguageModel, tokens: Tokens, edits: Edit | Sequence[Edit], ids: Tensor) -> Tensor:
    """Summed probability of some tokens at each prompt's end [b]."""
    p = lm.run(tokens, edits=edits, logits="last").last_logits.float().softmax(-1)
    return p[:, ids.to(p.device)].sum(-1).cpu()
