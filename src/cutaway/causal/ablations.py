"""What stands in an activation's place when it is taken away: one choice, the same for every method.

Two effects with different ablations are not comparable: zero is far from anything that the model ever computed, a mean
keeps what all examples share, a counterfactual's activation keeps everything but what the two prompts differ in (Chan
et al. 2022; Zhang & Nanda 2023; Miller, Chughtai & Saunders 2024). So the choice is a value, `Ablation`, that is
recorded with a result, and `replacement_run` says what it puts there. Means are over real tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, Misaligned, NotSupported
from cutaway.data.pairs import AlignedPairs
from cutaway.model.edits.values import prefix_keys, token_noise
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

AblationKind = Literal["resample", "zero", "mean", "mean_by_position", "mean_by_template", "noise"]
ABLATIONS: tuple[AblationKind, ...] = get_args(AblationKind)
_ROWS = 64  # prompts captured at once for a mean


@dataclass(frozen=True)
class Ablation:
    """What replaces an activation.

    Attributes:
        kind: "resample": the same place of the pair's other prompt (an interchange). "zero". "mean": the mean over all
            real tokens of the data. "mean_by_position": over the data, token position by token position; its prompts
            are of one length. "mean_by_template": over the prompts of the pair's own template, position by position.
            "noise": the activation plus gaussian noise.
        std: Of the noise, in the site's own standard deviations, over all its entries at the prompts' real tokens (Meng
            et al. 2022 use 3 at the embeddings).
        seed: Of the noise, which depends on it and on each row's tokens.
    """

    kind: AblationKind = "resample"
    std: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ABLATIONS:
            raise CutawayError(f"no ablation is called {self.kind!r}; there are {', '.join(ABLATIONS)}")
        if not 0 < self.std < float("inf"):
            raise CutawayError(f"noise of {self.std} standard deviations changes nothing; give a number above 0")

    def __str__(self) -> str:
        if self.kind == "noise":
            return f"gaussian noise of {self.std:g} standard deviations of the site, seed {self.seed}"
        return self.kind.replace("_", " ")


def ablation_of(choice: str | Ablation) -> Ablation:
    """An ablation from its name, or as it is. Raises `CutawayError` for a name that there is not."""
    return choice if isinstance(choice, Ablation) else Ablation(choice.replace(" ", "_"))  # type: ignore[arg-type]


def replacement_run(
    lm: LanguageModel,
    pairs: AlignedPairs,
    sites: Sequence[str],
    ablation: Ablation | str = "resample",
    *,
    into: Literal["clean", "corrupt"] = "clean",
    reference: Tokens | None = None,
) -> Run:
    """What an ablation puts at some sites, as a run that holds these values.

    Args:
        lm: The model.
        pairs: Aligned prompt pairs, n of them.
        sites: Site names.
        ablation: What stands in an activation's place, or its kind.
        into: The prompts that are ablated.
        reference: Tokens whose means are taken; None: both prompts of all pairs.

    Returns:
        A source for `cutaway.patch`, and `result[site]` is a tensor in the site's own layout, [n, p, ...]. For
        "resample" it is the run of the other prompts, in *their* tokens (a role may stand elsewhere there); for all
        other ablations it has the tokens of the prompts that are ablated. Values at padded columns mean nothing.

    Raises:
        NoSuchSite: An unknown site.
        Misaligned: A mean by position over prompts of several lengths.
        CutawayError: A mean by template where no pair names one; a mean over all tokens, or noise, at a site whose
            entries are keys (scores, pattern).
    """
    ablation = ablation_of(ablation)
    names = [lm.sites().resolve(site) for site in dict.fromkeys(sites)]
    own, other = (pairs.clean, pairs.corrupt) if into == "clean" else (pairs.corrupt, pairs.clean)
    if ablation.kind == "resample":
        return lm.run(other, capture=names, logits=None)
    if ablation.kind == "noise":
        given = lm.run(own, capture=names, logits=None)
        return replace(given, captured={name: _noisy(lm, given, name, ablation) for name in names})
    held = lm.run(own, capture=names[0], logits=None)
    if ablation.kind == "zero":
        return replace(held, captured={name: _zeros(lm, own, name) for name in names})
    return replace(held, captured=_means(lm, pairs, own, names, ablation, reference))


def _is_grid(name: str) -> bool:
    return name.endswith((".scores", ".pattern"))


def _zeros(lm: LanguageModel, tokens: Tokens, name: str) -> Tensor:
    n, p = tokens.ids.shape
    sizes = {"b": n, "p": p, "q": p, "k": p}
    shape = [sizes[part] if isinstance(part, str) else part for part in lm.sites()[name].shape]
    return torch.zeros(shape, dtype=lm.dtype, device=lm.device)


def _wide(lm: LanguageModel) -> torch.dtype:
    return torch.float32 if lm.device.type == "mps" else torch.float64


def _noisy(lm: LanguageModel, run: Run, name: str, ablation: Ablation) -> Tensor:
    if _is_grid(name):
        raise NotSupported(f"noise at {name!r} leaves no attention pattern; ablate another way, or put noise at attn.z")
    value, tokens = run[name], run.tokens
    std = value[tokens.mask.to(value.device)].to(_wide(lm)).std(unbiased=False)
    noisy = value.to(torch.promote_types(value.dtype, torch.float32)).clone()
    for row in range(len(tokens)):
        first = int(tokens.first[row])
        keys = prefix_keys(ablation.seed, tokens.row_ids(row))
        drawn = torch.stack([token_noise(key, name, value.shape[2:]) for key in keys]).to(noisy)
        noisy[row, first : first + len(keys)] += ablation.std * float(std) * drawn
    return noisy.to(value.dtype)


def _means(
    lm: LanguageModel,
    pairs: AlignedPairs,
    own: Tokens,
    names: list[str],
    ablation: Ablation,
    reference: Tokens | None,
) -> dict[str, Tensor]:
    """Means [n, p, ...] at every token of `own`: one mean for all tokens, or one for each (group, position)."""
    rows: list[Tokens] = [pairs.clean, pairs.corrupt] if reference is None else [reference]
    n = len(own)
    if ablation.kind == "mean":
        grid = next((name for name in names if _is_grid(name)), None)
        if grid is not None:
            raise NotSupported(f"a mean over tokens mixes the keys of {grid!r}; take the mean by position there")
        groups, own_groups, per_position = [[0] * len(tokens) for tokens in rows], [0] * n, False
    elif ablation.kind == "mean_by_position":
        lengths = {int(length) for tokens in (own, *rows) for length in tokens.lengths}
        if len(lengths) > 1:
            raise Misaligned(
                f"the prompts are {min(lengths)} to {max(lengths)} tokens long, so a mean by position mixes different "
                "places; take the mean by template, or the mean"
            )
        groups, own_groups, per_position = [[0] * len(tokens) for tokens in rows], [0] * n, True
    else:
        if reference is not None:
            raise CutawayError("a mean by template is over the pairs' own prompts; leave the reference out")
        templates = [pair.template for pair in pairs.pairs]
        if not all(templates):
            raise CutawayError(
                f"{sum(not name for name in templates)} of {n} pairs do not name their template, so there is no mean "
                "by template; give PromptPair(template=...), or take the mean by position"
            )
        keys = list(zip(templates, pairs.clean.lengths.tolist(), strict=True))  # of one length, or tokens do not match
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        own_groups, per_position = [numbers[key] for key in keys], True
        groups = [own_groups, own_groups]

    width = int(max(tokens.lengths.max() for tokens in (own, *rows))) if per_position else 1
    n_cells = (max(own_groups) + 1) * width
    wide, device = _wide(lm), lm.device
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(n_cells, dtype=wide, device=device)
    for tokens, group in zip(rows, groups, strict=True):
        for first in range(0, len(tokens), _ROWS):
            chosen = range(first, min(first + _ROWS, len(tokens)))
            part = tokens[list(chosen)]
            cells = _cells(part, [group[i] for i in chosen], width, per_position).to(device)
            mask = part.mask.to(device)
            run = lm.run(part, capture=names, logits=None)
            counts.index_add_(0, cells[mask], torch.ones(int(mask.sum()), dtype=wide, device=device))
            for name in names:
                value = (run[name].transpose(1, 2) if _is_grid(name) else run[name])[mask].to(wide)
                if name not in sums:
                    sums[name] = torch.zeros(n_cells, *value.shape[1:], dtype=wide, device=device)
                sums[name].index_add_(0, cells[mask], value)
    own_cells = _cells(own, own_groups, width, per_position).to(device)
    found = {}
    for name, total in sums.items():
        mean = total / counts.clamp(min=1).view(-1, *[1] * (total.ndim - 1))
        spread = mean[own_cells].to(lm.dtype)
        found[name] = spread.transpose(1, 2) if _is_grid(name) else spread
    return found


def _cells(tokens: Tokens, groups: Sequence[int], width: int, per_position: bool) -> Tensor:
    """Which mean each token belongs to [b, p]; 0 at padding."""
    group = torch.tensor(groups)[:, None]
    if not per_position:
        return group.expand(-1, tokens.ids.shape[1])
    return (group * width + tokens.position_ids.cpu()).where(tokens.mask.cpu(), 0)
