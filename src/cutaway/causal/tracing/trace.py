"""Causal tracing: which states bring a fact back once noise has hidden its subject?

Meng, Bau, Andonian & Belinkov (2022, "Locating and Editing Factual Associations in GPT"). Three runs a prompt: the
plain one; one with gaussian noise on the token embeddings of the subject; and, for each layer and token, the noised one
with one clean value put back. With P the probability of the right answer (of the model's guess where none is given),

    total effect     TE = P(plain) - P(noised)
    indirect effect  IE = P(noised, one value restored) - P(noised)

each averaged over several draws of the noise, and then over prompts (TE and AIE). States (`resid_post`) are restored
one at a time; what attention and the MLPs write is restored in windows of layers, since one layer alone moves little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval, false_discovery, mean_intervals, sign_flip_p_of_each
from cutaway.causal.tracing.prompts import BEHIND, IN_SUBJECT, ROLES, FactPrompt, answered, elsewhere_of, roles_of
from cutaway.model.edits.edits import Edit, patch
from cutaway.model.edits.edits import noise as noise_edit
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

Kind = Literal["state", "attention", "MLP"]
SITES: dict[Kind, str] = {"state": "resid_post", "attention": "attn.out", "MLP": "mlp.out"}
OTHER = "random other position"
_ROUNDING = 1e-6
_LEAST = 3  # prompts of a half with a role that can be chosen


@dataclass(frozen=True)
class CausalTrace:
    """Indirect effects of n prompts, layer × position, for states, attention and MLPs.

    `effects[kind]` [layers, k, n]: the indirect effect of the token k places behind the subject's first, mean over the
    draws, in probability; NaN behind the end of a prompt. `roles` [k, n] are indices into `ROLES`, -1 behind the end.
    `clean`, `noised`, `again` [n] are the probability of the answer in the plain run, in the noised runs, and in noised
    runs of other draws; `elsewhere` [n] with the same noise on as many tokens that are not the subject's (NaN where a
    prompt has none). `sigma` is one standard deviation of the subject tokens' embeddings, `multiple` how many of
    them the noise has. `refused` are the prompts that were left out, with the reason.
    """

    model: str
    n_layers: int
    facts: tuple[FactPrompt, ...]
    answers: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    starts: tuple[int, ...]
    sigma: float
    multiple: float
    draws: int
    window: int
    seed: int
    clean: Tensor
    noised: Tensor
    again: Tensor
    elsewhere: Tensor
    effects: dict[Kind, Tensor] = field(repr=False)
    roles: Tensor = field(repr=False)
    refused: tuple[tuple[FactPrompt, str], ...] = ()

    @property
    def n(self) -> int:
        return len(self.facts)

    @property
    def guessed(self) -> int:
        """How many prompts came without an answer: for them the model's own, right or wrong, stands in its place."""
        return sum(fact.answer is None for fact in self.facts)

    @property
    def which(self) -> str:
        """How many prompts, and whose answers they are judged by."""
        words = [f"{self.n - self.guessed} answered rightly"] if self.guessed < self.n else []
        words += [f"{self.guessed} with the model's own guess, not known to be right"] if self.guessed else []
        first, *rest = words
        count, how = first.split(" ", 1)
        return ", ".join([f"{count} prompt{'s' * (count != '1')} {how}", *rest])

    @property
    def columns(self) -> tuple[str, ...]:
        """The roles that some prompt has, in the order of the tokens."""
        return tuple(role for i, role in enumerate(ROLES) if bool((self.roles == i).any()))

    @property
    def counts(self) -> tuple[int, ...]:
        """How many prompts have each of `columns`."""
        return tuple(int((self.roles == ROLES.index(role)).any(0).sum()) for role in self.columns)

    def by_role(self, kind: Kind) -> Tensor:
        """Indirect effect [layers, columns, n]: each prompt's mean over its tokens of a role, NaN where it has none."""
        masks = torch.stack([self.roles == ROLES.index(role) for role in self.columns])
        return _mean(self.effects[kind][:, None], masks[None])

    def elsewhere_by_role(self, kind: Kind) -> Tensor:
        """The control [layers, columns, n]: each prompt's mean over its tokens, from the subject's first on, that do
        not have the role; this is the expectation of restoring one random other position."""
        masks = torch.stack([(self.roles >= 0) & (self.roles != ROLES.index(role)) for role in self.columns])
        values = _mean(self.effects[kind][:, None], masks[None])
        return torch.where(self.by_role(kind).isnan(), torch.full_like(values, torch.nan), values)

    def aie(self, kind: Kind) -> Tensor:
        """Average indirect effect [layers, columns], over the prompts that have the role."""
        return self.by_role(kind).nanmean(-1)

    def interval(self, kind: Kind, n_resamples: int = 2000, seed: int = 0) -> Tensor:
        """95 % interval of the AIE over the prompts with the role [2, layers, columns]; NaN below two of them."""
        values = self.by_role(kind).double().numpy()
        ends = np.full((2, *values.shape[:2]), np.nan)
        for at in range(values.shape[1]):
            has = ~np.isnan(values[0, at])
            ends[..., at] = mean_intervals(values[:, at, has], n_resamples, seed)
        return torch.from_numpy(ends).float()

    def p(self, kind: Kind) -> Tensor:
        """Two-sided p [layers, columns] of each cell against a random other position, by flipping prompts' signs."""
        difference = (self.by_role(kind) - self.elsewhere_by_role(kind)).double()
        # differences of rounding alone would have a small p
        difference[difference.abs() <= _ROUNDING] = 0.0
        found = sign_flip_p_of_each(difference.flatten(0, 1).numpy())
        return torch.from_numpy(found).view(difference.shape[:2])

    def q(self, kind: Kind) -> Tensor:
        """The rate of false discoveries [layers, columns] among all cells of a kind with a p as small."""
        return torch.from_numpy(false_discovery(self.p(kind).numpy()))

    def discoveries(self, kind: Kind) -> str:
        """How many cells stand out from other positions, with one in twenty of them expected to be false."""
        q = self.q(kind)
        return f"{int((q <= 0.05).sum())} of {int((~q.isnan()).sum())} cells have q at most 0.05"

    def _choices(self, component: str, positions: str) -> Choices:
        return Choices(
            granularity="node",
            component=component,
            ablation=f"gaussian noise of {self.multiple:g} σ (σ = {self.sigma:.4g}) on the subject's embeddings, "
            f"{self.draws} draws",
            positions=positions,
            direction="denoise",
            evaluation=f"{self.which} ({self.model})",
        )

    def total_effect(self, command: str | None = None) -> Effect:
        """What the noise takes from the answer, beside the same noise on as many other tokens."""
        loss, other = (self.clean - self.noised).numpy(), (self.clean - self.elsewhere).numpy()
        other = other[~np.isnan(other)]
        controls = (
            (Control("same noise on other tokens", float(other.mean()), bootstrap_interval(other), len(other)),)
            if len(other)
            else ()
        )
        return Effect(
            name="total effect of noise on the subject",
            value=float(loss.mean()),
            n=self.n,
            interval=bootstrap_interval(loss),
            controls=controls,
            ablation=f"noise of {self.multiple:g} σ on the subject's embeddings",
            units="probability of the answer",
            command=command,
            choices=self._choices("embed", "subject"),
        )

    def effect(
        self, kind: Kind, layer: int, role: str, *, rows: Sequence[int] | None = None, command: str | None = None
    ) -> Effect:
        """One cell's average indirect effect, beside restoring a random other position and restoring nothing."""
        if not 0 <= layer < self.n_layers or role not in self.columns:
            raise CutawayError(
                f"this trace has no cell ({layer}, {role!r}); its layers are 0 to {self.n_layers - 1}, its roles "
                f"{', '.join(repr(column) for column in self.columns)}"
            )
        pick = list(range(self.n)) if rows is None else list(rows)
        at = self.columns.index(role)
        values, others = (
            found[layer, at, pick].numpy() for found in (self.by_role(kind), self.elsewhere_by_role(kind))
        )
        known = ~np.isnan(values)
        values, others = values[known], others[known & ~np.isnan(others)]
        nothing = (self.again - self.noised)[pick].numpy()[known]
        what = f"{SITES[kind]} of L{layer}" if kind == "state" else f"{SITES[kind]} of {self.layers_of(layer)}"
        named = [(OTHER, others)] if len(others) else []
        return Effect(
            name=f"restoring {what} at “{role}”",
            value=float(values.mean()) if len(values) else math.nan,
            n=len(values),
            interval=bootstrap_interval(values),
            controls=tuple(
                Control(name, float(found.mean()), bootstrap_interval(found), len(found))
                for name, found in (*named, ("restoring nothing, other draws of the noise", nothing))
            ),
            ablation=f"noise of {self.multiple:g} σ on the subject, then one clean value put back",
            units="probability of the answer",
            command=command,
            choices=self._choices(what, role),
        )

    def best(self, kind: Kind, roles: Sequence[str] = ROLES, *, command: str | None = None) -> Effect | None:
        """The cell with the largest AIE among some roles, chosen on every second prompt and measured on the others (8
        or more prompts); with fewer, chosen and measured on all of them, which flatters it. A role that fewer than 3
        prompts of either half have is no candidate; None where there is none.

        States after the last layer are no candidates: at the last token they are the answer itself.
        """
        held_out = self.n >= 8
        values = self.by_role(kind)
        means = (values[..., 0::2] if held_out else values).nanmean(-1).nan_to_num(-torch.inf)
        for at, column in enumerate(self.columns):
            has = ~values[0, at].isnan()
            scarce = held_out and min(int(has[0::2].sum()), int(has[1::2].sum())) < _LEAST
            if column not in roles or scarce:
                means[:, at] = -torch.inf
        if kind == "state":
            means[-1] = -torch.inf
        if not bool(means.isfinite().any()):
            return None
        layer, at = divmod(int(means.argmax()), len(self.columns))
        rows = range(1, self.n, 2) if held_out else None
        return self.effect(kind, layer, self.columns[at], rows=rows, command=command)

    def sites(self, kind: Kind, command: str | None = None) -> list[Effect]:
        """The largest effect on the subject (the paper's "early site") and the largest behind it (the "late site")."""
        found = (self.best(kind, roles, command=command) for roles in (IN_SUBJECT, BEHIND))
        return [effect for effect in found if effect is not None]

    def layers_of(self, layer: int) -> str:
        """The window of layers around one, as it is restored for attention and MLPs."""
        first, last = window_of(layer, self.window, self.n_layers)
        return f"L{first}" if first == last else f"L{first}-L{last}"

    def to_json(self, command: str | None = None) -> dict[str, Any]:
        def plain(values: Tensor) -> list[Any]:
            return [[None if math.isnan(x) else x for x in row] for row in values.tolist()]

        grids = {}
        for kind in SITES:
            low, high = self.interval(kind)
            grids[kind] = {
                "site": SITES[kind],
                "window": 1 if kind == "state" else self.window,
                "aie": plain(self.aie(kind)),
                "low": plain(low),
                "high": plain(high),
                "p": plain(self.p(kind)),
                "q": plain(self.q(kind)),
                "random_other_position": plain(self.elsewhere_by_role(kind).nanmean(-1)),
                "largest": [effect.to_json() for effect in self.sites(kind, command)],
            }
        return {
            "model": self.model,
            "n": self.n,
            "n_layers": self.n_layers,
            "sigma": self.sigma,
            "noise_in_sigma": self.multiple,
            "draws": self.draws,
            "seed": self.seed,
            "roles": list(self.columns),
            "prompts_with_role": [
                int((self.roles == ROLES.index(role)).any(0).sum()) for role in self.columns
            ],
            "total_effect": self.total_effect(command).to_json(),
            "clean": self.clean.mean().item(),
            "noised": self.noised.mean().item(),
            "grids": grids,
            "prompts": [
                {
                    "prompt": fact.prompt,
                    "subject": fact.subject,
                    "answer": answer,
                    "guessed": fact.answer is None,
                    "clean": clean,
                    "noised": noised,
                    "tokens": list(strings[start:]),
                    "effects": {
                        kind: values[:, : len(strings) - start, row].tolist() for kind, values in self.effects.items()
                    },
                }
                for row, (fact, answer, clean, noised, strings, start) in enumerate(
                    zip(
                        self.facts, self.answers, self.clean.tolist(), self.noised.tolist(), self.tokens, self.starts,
                        strict=True,
                    )
                )
            ],
            "refused": [{"prompt": fact.prompt, "reason": reason} for fact, reason in self.refused],
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"causal tracing of {self.model}: {self.which}"
            + (f"; {len(self.refused)} more answered otherwise are left out" if self.refused else ""),
            f"P(answer) {self.clean.mean():.3f} plain, {self.noised.mean():.3f} with noise of {self.multiple:g} σ (σ = "
            f"{self.sigma:.4g}) on the subject, {self.draws} draws: total effect "
            f"{(self.clean - self.noised).mean():.3f}",
        ]
        total = self.total_effect()
        lines += [f"  {_beside(total)}"] if total.controls else []
        width = [max(8, len(name) + 2) for name in self.columns]
        for kind in SITES:
            where = "one layer" if kind == "state" else f"windows of {self.window} layer{'s' * (self.window != 1)}"
            lines.append("")
            lines.append(f"average indirect effect of {SITES[kind]}, {where}")
            lines.append(" " * 6 + "".join(f"{name:>{w}}" for name, w in zip(self.columns, width, strict=True)))
            for layer, row in enumerate(self.aie(kind).tolist()):
                cells = "".join(
                    f"{'–' if math.isnan(value) else f'{value:.3f}':>{w}}" for value, w in zip(row, width, strict=True)
                )
                lines.append(f"  L{layer:<3} {cells}")
            lines.append("  n    " + "".join(f"{n:>{w}}" for n, w in zip(self.counts, width, strict=True)))
            lines += [f"  {_beside(effect)}" for effect in self.sites(kind)]
            lines += [f"  {self.discoveries(kind)}"] if self.n > 1 else []
        return "\n".join(lines)


def _beside(effect: Effect) -> str:
    """An effect and its controls as one line."""

    def written(one: Effect | Control) -> str:
        ends = interval_text(one.interval, to=True)
        return f"{one.value:.3f}" + ("" if ends == "–" else f" ({ends})")

    beside = "; ".join(f"{control.name} {written(control)}" for control in effect.controls)
    return f"{effect.name}: {written(effect)}, n {effect.n}" + (f"; control: {beside}" if beside else "")


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over dimension -2 where `mask` is True; NaN where it is nowhere."""
    mask = mask.expand(*mask.shape[:-2], *values.shape[-2:])
    count = mask.sum(-2)
    total = torch.where(mask, values, torch.zeros_like(values)).sum(-2)
    return torch.where(count > 0, total / count.clamp(min=1), torch.full_like(total, torch.nan))


def default_window(n_layers: int) -> int:
    """A quarter of the layers, at most the paper's 10 (of 48)."""
    return min(10, max(1, n_layers // 4))


def window_of(layer: int, window: int, n_layers: int) -> tuple[int, int]:
    """First and last layer of the window around a layer, cut at the ends of the model."""
    return max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2) - 1


def causal_trace(
    lm: LanguageModel,
    facts: Sequence[FactPrompt],
    *,
    noise: float = 3.0,
    draws: int = 10,
    window: int | None = None,
    limit: int | None = None,
    batch_rows: int = 256,
    bos: bool | None = None,
    seed: int = 0,
) -> CausalTrace:
    """Trace every prompt that the model answers rightly (every token of the answer is its most probable one) or that
    has no answer, or the first `limit` of them. Without an answer the model's most probable token is traced: a guess,
    which the result calls so (`guessed`).

    `noise` is in standard deviations of the subject tokens' embeddings, over the prompts that are kept; `draws` is the
    number of noise draws a prompt; `window` the number of layers in which attention and MLP outputs are restored
    together (default: a quarter of the layers, at most 10). All cells of a draw see the same noise.

    Raises `CutawayError`: a subject that its prompt lacks, no prompt that is answered rightly, numbers out of range.
    """
    width = default_window(lm.n_layers) if window is None else window
    if not 1 <= width <= lm.n_layers:
        raise CutawayError(f"a window of {width} layers does not fit {lm.name}; give 1 to {lm.n_layers}")
    if draws < 1 or not 0 < noise < math.inf:
        raise CutawayError(f"noise of {noise:g} σ in {draws} draws hides nothing; give more than 0 of both")
    known = answered(lm, facts, bos, limit)
    n, tokens, lengths = len(known.facts), known.tokens, known.tokens.lengths.tolist()
    clean = lm.run(tokens, capture=["embed", *(f"blocks.*.{site}" for site in SITES.values())], logits="last")
    embeddings = clean["embed"].float()
    values = [
        embeddings[row, tokens.column(row, first) : tokens.column(row, last) + 1]
        for row, (first, last) in enumerate(known.spans)
    ]
    sigma = float(torch.cat(values).std(correction=0))

    def noised_run(positions: list[list[int]], first_seed: int, capture: list[str] | None) -> tuple[Run, Tensor]:
        """Every prompt under every draw of the noise, draw by draw; and the probability of its answer [n]."""
        rows = [row for row in range(n) if positions[row]]
        several = tokens[list(range(n)) * draws]
        edit = noise_edit(
            "embed",
            noise * sigma,
            rows=[draw * n + row for draw in range(draws) for row in rows],
            positions=[positions[row] for _ in range(draws) for row in rows],
            seed=[first_seed + draw for draw in range(draws) for _ in rows],
        )
        run = lm.run(several, capture=capture, edits=[edit], logits="last")
        found = probability(run.last_logits, tokens[list(range(n))])
        return run, found.view(draws, n).mean(0)

    answers = known.answers.to(lm.device)

    def probability(logits: Tensor, _tokens: Tokens) -> Tensor:
        """Probability of each prompt's answer, also of several copies of the prompts behind each other."""
        wanted = answers.repeat(len(logits) // n)
        return logits.float().softmax(-1).gather(-1, wanted[:, None])[:, 0]

    subject = [list(range(first, last + 1)) for first, last in known.spans]
    base = 1000 * seed  # draws of one seed never meet those of another
    noised, hidden = noised_run(subject, base, ["blocks.0.resid_pre", "blocks.*.resid_post"])
    _, again = noised_run(subject, base + draws, None)
    other = elsewhere_of(known.spans, lengths, seed)
    elsewhere = torch.full((n,), torch.nan)
    if any(other):
        _, found = noised_run(other, base, None)
        elsewhere = torch.where(torch.tensor([bool(o) for o in other]), found.cpu(), elsewhere)

    roles = roles_of(known.spans, lengths)
    cells = _cells(lm, clean, noised, [first for first, _ in known.spans], roles, width, draws)
    swept = lm.sweep(tokens, cells, probability, batch_rows=batch_rows, label="causal tracing")
    restored = swept.values.view(len(SITES), draws, lm.n_layers, len(roles), n).mean(1)
    effects = torch.where(roles[None, None] >= 0, restored - hidden.cpu(), torch.full_like(restored, torch.nan))
    return CausalTrace(
        model=lm.name,
        n_layers=lm.n_layers,
        facts=tuple(known.facts),
        answers=tuple(lm.token_strings(known.answers)),
        tokens=tuple(tokens.strings),
        starts=tuple(first for first, _ in known.spans),
        sigma=sigma,
        multiple=noise,
        draws=draws,
        window=width,
        seed=seed,
        clean=probability(clean.last_logits, tokens).cpu(),
        noised=hidden.cpu(),
        again=again.cpu(),
        elsewhere=elsewhere,
        effects=dict(zip(SITES, effects, strict=True)),
        roles=roles,
        refused=tuple(known.refused),
    )


def _cells(
    lm: LanguageModel, clean: Run, noised: Run, starts: Sequence[int], roles: Tensor, window: int, draws: int
) -> list[list[Edit]]:
    """One list of edits for each kind, draw, layer and place behind the subject's start, in that order.

    Each takes the noised stream over just below what it restores, from the subject on, so that the layers and the
    tokens before it need not run again; at every token where attention is not causal, for then the noise is everywhere.
    """
    n = roles.shape[1]
    lengths = clean.tokens.lengths.tolist()
    noisy = [list(range(start if lm.causal else 0, length)) for start, length in zip(starts, lengths, strict=True)]
    cells = []
    for kind, site in SITES.items():
        for draw in range(draws):
            origin = [draw * n + row for row in range(n)]
            for layer in range(lm.n_layers):
                first, last = (layer, layer) if kind == "state" else window_of(layer, window, lm.n_layers)
                if kind == "state":
                    below = f"blocks.{layer}.resid_post"
                else:
                    below = f"blocks.{first - 1}.resid_post" if first else "blocks.0.resid_pre"
                hide = patch(below, noised, positions=noisy, source_rows=origin)
                for place, of_place in enumerate(roles):
                    rows = (of_place >= 0).nonzero()[:, 0].tolist()
                    at = [[starts[row] + place] for row in rows]
                    restore = [
                        patch(f"blocks.{here}.{site}", clean, rows=rows, positions=at, source_rows=rows)
                        for here in range(first, last + 1)
                    ]
                    cells.append([hide, *restore])
    return cells
