"""What an answer really loses when a part that direct attribution names is mean-ablated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import ResultSequence
from cutaway.model.edits import edits
from cutaway.model.edits.edits import Edit
from cutaway.model.forward.run import Run
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.results import Attribution, Part
from cutaway.observe.summaries import block, ends

_SITES = {
    "embedding": "embed",
    "positions": "pos_embed",
    "attention": "blocks.{l}.attn.out",
    "MLP": "blocks.{l}.mlp.out",
    "head": "blocks.{l}.attn.z",
    "neuron": "blocks.{l}.mlp.post",
}


@dataclass(frozen=True)
class AblatedPart:
    """A part, and the mean fall of the logit difference (before a softcap) when it is mean-ablated."""

    part: Part
    """The part, with its direct share."""
    effect: Effect
    """The fall, beside that for parts of the same kind with smaller shares."""


@dataclass(frozen=True, eq=False, repr=False)
class PartAblations(ResultSequence[AblatedPart]):
    """What the answer really loses without each of the largest parts: a sequence of `AblatedPart`."""

    title: ClassVar[str] = "Shares and what is lost without them"

    model: str
    """The model's name."""
    parts: tuple[AblatedPart, ...]
    """The parts, largest share first."""

    def _items(self) -> tuple[AblatedPart, ...]:
        return self.parts

    def summary(self) -> str:
        """Direct share and fall of the first ten parts."""
        lines = [f"{self.model}: direct share, and fall when mean-ablated alone"]
        for one in self.parts[:10]:
            fall = one.effect.figure(3)
            beside = f"  random parts {one.effect.controls[0].value:.3f}" if one.effect.controls else ""
            lines.append(f"  {one.part.name:<18}{one.part.value:>8.3f}   fall {fall}{beside}")
        return block(lines)

    def to_json(self) -> list[dict[str, Any]]:
        return [{"part": one.part.name, "share": one.part.value, **one.effect.to_json()} for one in self.parts]

    def rows(self) -> list[dict[str, Any]]:
        """One row per part: direct share, fall with its interval, and the control."""
        return [
            {"part": one.part.name, "share": one.part.value, "fall": one.effect.value, **ends(one.effect.interval)}
            | {"control": one.effect.controls[0].value if one.effect.controls else None, "n": one.effect.n}
            for one in self.parts
        ]

    def drawing(self) -> Markup:
        """The table of shares and falls."""
        return sections_html([ablations_section(self.parts)] if self.parts else [])


def ablate_parts(
    lm: LanguageModel, result: Attribution, k: int = 8, *, reference: Inputs | None = None, seed: int = 0
) -> PartAblations:
    """Mean-ablate each of the parts with the largest shares, alone, at the attributed position.

    An effect is the fall of the logit difference; it stands beside the falls for up to k parts of the same kind, drawn
    from those with smaller shares. Biases are constants and cannot be mean-ablated, so they are passed over.

    Args:
        lm: the model.
        result: an attribution of this model.
        k: how many parts.
        reference: texts, ids or Tokens over whose real tokens the mean is taken, each row's first left out, as its
            values are unlike any other's; the prompts themselves if None.
        seed: of the parts drawn as controls.

    Returns:
        The parts, largest share first, each with its effect.

    Raises:
        NotSupported: an attribution by source, whose parts are no values that an edit can replace alone.
        CutawayError: a prompt of one token, which has no mean without its first.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> prompt = "The capital of the state containing Dallas is"
        >>> shares = attribute(lm, prompt, " Austin", " Sacramento", by="head")
        >>> len(ablate_parts(lm, shares, 3).parts)
        3
    """
    if result.by == "source":
        raise NotSupported(
            "An attribution by source has no ablation: what one head reads from one position is not a value of its "
            "own. Attribute by head to ablate."
        )
    able = [number for number in result.ranked() if result.locate(number)[0].kind in _SITES]
    chosen = [result.part(number) for number in able[:k]]
    drawn = {kind: _draw(result, able[k:], kind, k, seed) for kind in {part.kind for part in chosen}}
    tokens = result.tokens
    source = tokens if reference is None else lm.tokens(reference)
    every = [*chosen, *(part for parts in drawn.values() for part in parts)]
    names = sorted({_SITES[part.kind].format(l=part.layer) for part in every})
    means = _means(lm, source, names)
    base = lm.run(tokens, capture=["blocks.*.resid_pre", *(name for name in names if name.endswith("mlp.post"))])

    def falls(part: Part) -> Tensor:
        return result.total - _difference(lm, result, _edit(part, result, means, base), base)

    controls = {kind: _control(kind, [falls(part) for part in parts]) for kind, parts in drawn.items()}
    where = "the prompts" if reference is None else "the reference texts"
    ablated = []
    for part in chosen:
        rows = falls(part)
        effect = Effect(
            name=f"fall of the logit difference without {part.name}",
            value=float(rows.mean()),
            n=len(rows),
            interval=bootstrap_interval(rows.numpy()) if len(rows) > 1 else None,
            controls=controls[part.kind],
            ablation=f"mean ablation at the attributed position, mean over {where} without their first tokens",
            units="logit difference",
        )
        ablated.append(AblatedPart(part, effect))
    return PartAblations(lm.name, tuple(ablated))


def _draw(result: Attribution, numbers: list[int], kind: str, k: int, seed: int) -> list[Part]:
    """Up to k parts of a kind, drawn from `numbers`."""
    same = [number for number in numbers if result.locate(number)[0].kind == kind]
    order = torch.randperm(len(same), generator=torch.Generator().manual_seed(seed))[:k]
    return [result.part(same[int(i)]) for i in order]


def _control(kind: str, falls: list[Tensor]) -> tuple[Control, ...]:
    if not falls:
        return ()
    sizes = torch.stack(falls).abs().mean(1)
    interval = bootstrap_interval(sizes.numpy()) if len(sizes) > 1 else None
    name = f"mean |fall| without {kind} parts of smaller share, drawn at random"
    return (Control(name, float(sizes.mean()), interval, len(sizes)),)


def _means(lm: LanguageModel, tokens: Tokens, names: list[str]) -> dict[str, Tensor]:
    """Mean of each site over real tokens but each row's first one: the site's shape for one token."""
    run = lm.run(tokens, capture=names, logits=None)
    keep = tokens.mask.clone()
    keep[torch.arange(len(tokens)), tokens.first] = False
    if not bool(keep.any()):
        raise CutawayError("A mean for the ablation needs a prompt of at least two tokens; give reference= texts.")
    return {name: run[name][keep.to(run[name].device)].float().mean(0) for name in names}


def _edit(part: Part, result: Attribution, means: dict[str, Tensor], base: Run) -> Edit:
    name = _SITES[part.kind].format(l=part.layer)
    positions = [[place] for place in result.position]
    if part.kind == "head":
        value = means[name][part.index : part.index + 1]
        return edits.mean(name, value, positions=positions, heads=[part.index])
    if part.kind == "neuron":  # the layer's neurons as they are, this one at its mean
        rows = torch.arange(len(result.position))
        columns = result.tokens.first.cpu() + torch.tensor(result.position)
        value = base[name][rows, columns].clone()
        value[:, part.index] = means[name][part.index]
        return edits.set(name, value[:, None], positions=positions)
    return edits.mean(name, means[name], positions=positions)


def _difference(lm: LanguageModel, result: Attribution, edit: Edit, base: Run) -> Tensor:
    """The logit difference before the softcap under an edit, float64 [b]."""
    capped = result.softcap is not None
    run = lm.run(result.tokens, edits=edit, capture="logits_precap" if capped else None, resume=base)
    logits = run["logits_precap"] if capped else run.all_logits
    columns = result.tokens.first.cpu() + torch.tensor(result.position)
    return result.difference(logits[torch.arange(len(columns)), columns.to(logits.device)].double().cpu())


def ablations_section(ablated: Sequence[AblatedPart]) -> Section:
    """Shares beside the measured falls, as a table."""
    rows = []
    for one in ablated:
        effect = one.effect
        control = effect.controls[0] if effect.controls else None
        span = interval_text(effect.interval, to=True)
        beside = None if control is None else control.value
        rows.append([one.part.name, one.part.value, effect.value, span, beside])
    text = (
        f"The fall of the logit difference when a part alone is replaced by its mean ({ablated[0].effect.ablation}). "
        "Where it is larger than the share, later layers read the part; where it is smaller, they make up for it. The "
        "control is the mean |fall| without parts of the same kind with smaller shares, drawn at random."
    )
    columns = ("part", "direct share", "fall when ablated", "95 % interval", "control")
    return ("What the answer loses without them", text, table_html(columns=columns, rows=rows, title="ablations"))
