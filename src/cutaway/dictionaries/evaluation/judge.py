"""Everything that is measured of a dictionary, over the dictionaries of several seeds, each figure beside its control.

    judged = judge(lm, [seed_0, seed_1, seed_2], held_out_rows)
    print(judged)
    judged.effects["ce_recovered_mean"].interval    # includes rows and seeds
    judged.per_seed["ce_recovered_mean"]            # each dictionary's own

Figures of reconstruction and of the spliced model (`evaluate.py`), latents one by one (`latents.py`), stability across
seeds (`stability.py`), and the two sides of a crosscoder (`crosscoders.py`). What latents *mean* is asked with labels:
`probing.py`, `absorption.py`.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.files import plain
from cutaway.artifacts.results import Effect, interval_text
from cutaway.dictionaries.dictionary import Dictionary, random_dictionary
from cutaway.dictionaries.evaluation.crosscoders import Sides, compare_sides
from cutaway.dictionaries.evaluation.evaluate import ALL, RANDOM, RowSums, measure
from cutaway.dictionaries.evaluation.figures import (
    NAMES,
    SPLICED,
    figure_line,
    figure_rows,
    mean_effect,
    share_effect,
    summary,
)
from cutaway.dictionaries.evaluation.frontier import Point
from cutaway.dictionaries.evaluation.latents import DENSE, LatentStatistics, density_svg, latent_statistics
from cutaway.dictionaries.evaluation.stability import stability
from cutaway.dictionaries.ports import Models, PortValues
from cutaway.dictionaries.selectors import describe
from cutaway.draw.charts import effects_html
from cutaway.draw.panels import figures_html, table_html
from cutaway.draw.result import Result

_SHUFFLED = "encoders given to other latents"
_DRAWN = ("variance_explained", "ce_recovered_mean", "ce_increase", "cosine", "norm_ratio", "stability_cosine", "dead")


@dataclass(frozen=True, eq=False, repr=False)
class Judgement(Result):
    """Everything that was measured of S dictionaries that differ in their seed."""

    title = "Dictionaries, judged"

    dictionaries: tuple[Dictionary, ...]
    """The dictionaries, [S]."""
    effects: dict[str, Effect]
    """By name, means over the dictionaries: those of `Evaluation`, and "dead", "dense", "nearest_decoder",
    "decoder_norm", "encoder_decoder", "stability_cosine", "stability_found_again"."""
    per_seed: dict[str, tuple[float, ...]]
    """The same of each dictionary; of stability, of each pair of seeds."""
    parts: dict[str, dict[str, Effect]]
    """Figures of a crosscoder's outputs and models."""
    latents: tuple[LatentStatistics, ...]
    """Latents one by one, of each dictionary."""
    control_latents: LatentStatistics
    """The same of a dictionary of random directions."""
    sides: tuple[Sides, ...]
    """A crosscoder's outputs in pairs."""
    ce: dict[str, float]
    """Mean cross-entropy in nats of the model as it is ("clean"), and with the site replaced."""
    n_rows: int
    """Held-out rows."""
    n_tokens: int
    """Tokens that were counted."""
    n_spliced: int
    """Rows that were run again with the reconstruction in place."""
    values: PortValues
    """The activations, for what else is to be asked of them."""
    notes: tuple[str, ...] = ()
    """What makes a figure mean less than it seems."""

    @property
    def setting(self) -> str:
        """The dictionary in a few words, without its seed."""
        one = self.dictionaries[0]
        return f"{one.kind}, {one.d_sae:,} latents, {describe(one.selector)}"

    def point(self, line: str | None = None, label: str | None = None) -> Point:
        """A point of a frontier.

        Args:
            line: The line that it belongs to; None: the selector's name.
            label: What distinguishes it from others there; None: the selector in a few characters.
        """
        one = self.dictionaries[0]
        return Point(line or one.selector.name, label or describe(one.selector), self.effects)

    def all_effects(self) -> list[tuple[str, Effect, tuple[float, ...]]]:
        """Every effect with its name and its values by seed (empty for parts)."""
        found = [(name, one, self.per_seed.get(name, ())) for name, one in self.effects.items()]
        found += [(f"{name} @ {part}", one, ()) for part, some in self.parts.items() for name, one in some.items()]
        for sides in self.sides:
            found += [(name, one, ()) for name, one in sides.effects.items()]
        return found

    def summary(self) -> str:
        shown = ("l0", "variance_explained", "cosine", "ce_recovered_mean", "ce_increase", "kl", "dead", "dense")
        lines = str(self).split("\n")[:2] + [
            f"  {figure_line(self.effects[name])}" for name in (*shown, "stability_cosine") if name in self.effects
        ]
        return "\n".join([*lines, *([f"  {len(self.notes)} notes: see .notes"] if self.notes else [])])

    def rows(self) -> list[dict[str, Any]]:
        return figure_rows((name, one) for name, one, _ in self.all_effects())

    def drawing(self) -> Markup:
        parts = [Markup("<h3>{}</h3><p>{}</p>{}").format(*section) for section in judgement_sections(self)]
        return _density_drawing(self) + Markup("").join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "dictionaries": [repr(one) for one in self.dictionaries],
            "seeds": len(self.dictionaries),
            "rows": self.n_rows,
            "tokens": self.n_tokens,
            "spliced_rows": self.n_spliced,
            "excluded_for_high_norm": self.values.excluded,
            "effects": {name: one.to_json() for name, one in self.effects.items()},
            "per_seed": {name: list(each) for name, each in self.per_seed.items()},
            "parts": {part: {name: one.to_json() for name, one in some.items()} for part, some in self.parts.items()},
            "cross_entropy": self.ce,
            "latents": [some.to_json() for some in self.latents],
            "control_latents": self.control_latents.to_json(),
            "sides": [sides.to_json() for sides in self.sides],
            "notes": list(self.notes),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of all figures as text: value, interval, seeds, controls, n."""
        several = len(self.dictionaries) > 1
        heads = ["figure", "value", "95 % interval", *(["by seed"] if several else []), "controls", "n"]
        rows = []
        for _, one, each in self.all_effects():
            beside = "; ".join(f"{control.name.split(',')[0]} {control.value:.4g}" for control in one.controls)
            seeds = [", ".join(f"{value:.4g}" for value in each[:6]) + (" …" if len(each) > 6 else "")]
            ends = [f"{end:.4g}" for end in one.interval or ()]
            span = " to ".join(ends) if len(set(ends)) == 2 else interval_text(one.interval, 4, to=True)
            cells = [one.name, f"{one.value:.4g}", span, *(seeds if several else []), beside]
            of = "rows" if any(one.name.startswith(label) for label, *_ in NAMES.values()) else "latents"
            rows.append([*cells, f"{one.n:,} {of}"])
        return heads, rows

    def __str__(self) -> str:
        n_seeds = len(self.dictionaries)
        seeds = f"{n_seeds} seeds" if n_seeds > 1 else "one seed"
        ports = repr(self.dictionaries[0])
        excluded = f", {self.values.excluded:,} left out for their norm" if self.values.excluded else ""
        lines = [
            f"{ports}, {seeds}",
            f"{self.n_tokens:,} tokens of {self.n_rows} rows{excluded}; {self.n_spliced} rows spliced",
        ]
        if self.ce:
            lines.append("cross-entropy, nats: " + ", ".join(f"{name} {value:.3f}" for name, value in self.ce.items()))
        heads, rows = self.table()
        lines.append("")
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        for row in [heads, *rows]:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _density_drawing(judged: Judgement) -> Markup:
    """How often latents are active, one curve per seed, beside random directions."""
    several = len(judged.latents) > 1
    names = [f"seed {place + 1}" if several else "this dictionary" for place in range(len(judged.latents))]
    frequencies = {name: some.frequency for name, some in zip(names, judged.latents, strict=True)}
    return density_svg(frequencies, judged.n_tokens, judged.control_latents.frequency)


def judgement_sections(judged: Judgement) -> list[tuple[str, str, Markup]]:
    """Heading, text and drawing of each part: in short, controls, densities, a crosscoder's sides, every figure."""
    effects = judged.effects
    n_seeds = len(judged.dictionaries)
    tiles: list[Any] = [
        {"label": "active per token (L0)", "value": effects["l0"].value},
        {"label": "variance explained", "value": effects["variance_explained"].value},
        {"label": "dead latents", "value": 100 * effects["dead"].value, "units": "%"},
        {"label": "dense latents", "value": 100 * effects["dense"].value, "units": "%"},
    ]
    if "ce_increase" in effects:
        tiles.insert(2, {"label": "rise of the cross-entropy", "value": effects["ce_increase"].value, "units": "nats"})
    if n_seeds > 1 and "stability_found_again" in effects:
        again = effects["stability_found_again"].value
        tiles.append({"label": "found again by another seed", "value": 100 * again, "units": "%"})
    seeds = f"Means over {n_seeds} seeds; intervals count rows and seeds." if n_seeds > 1 else (
        "One seed: intervals count rows alone, and say nothing about what another training would have found."
    )  # fmt: skip
    sections = [
        (
            "in short",
            " ".join([f"{judged.setting}. {seeds}", *(f"{note[0].upper()}{note[1:]}." for note in judged.notes)]),
            figures_html(items=tiles),
        ),
        (
            "beside the controls",
            "Each figure and the same figure of its controls, with 95 % intervals.",
            effects_html(effects[key] for key in _DRAWN if key in effects),
        ),
    ]
    dead = ", ".join(str(some.n_dead) for some in judged.latents)
    dense = ", ".join(str(some.n_dense) for some in judged.latents)
    sections.append(
        (
            "how often latents are active",
            f"Never active, and not drawn, are {dead} of {judged.dictionaries[0].d_sae:,} latents (random directions: "
            f"{judged.control_latents.n_dead}). Active on more than 10 % of tokens are {dense} (random directions: "
            f"{judged.control_latents.n_dense}).",
            _density_drawing(judged),
        )
    )
    for sides in judged.sides:
        text = (
            f"0 is a latent of {sides.labels[0]} alone, 1 of {sides.labels[1]} alone; decoder norms in units of each "
            f"side's spread."
        )
        sections.append((f"{sides.labels[0]} and {sides.labels[1]}", text, sides.drawing()))
    heads, rows = judged.table()
    sections.append(("every figure", "", table_html(columns=heads, rows=rows, title="every figure")))
    return sections


def judge(
    models: Models,
    dictionaries: Dictionary | Sequence[Dictionary],
    rows: Tensor,
    *,
    spliced_rows: int = 32,
    high_norm: float | None = None,
    signed: bool = True,
    seed: int = 0,
) -> Judgement:
    """Everything that is measured of dictionaries that differ in their seed, on held-out rows.

    Args:
        models: The model that they belong to; for a crosscoder of two models, both.
        dictionaries: One, or several that differ in nothing but their seed.
        rows: Held-out token ids [n, p].
        spliced_rows: How many of the rows are run again with the reconstruction in place; 0 leaves those figures out.
        high_norm: Leave out positions whose vector is longer than so many times the site's median.
        signed: Whether latents of different seeds are matched by signed cosine; by absolute cosine if not.
        seed: Of the controls.

    Returns:
        Figures with 95 % intervals that count rows and seeds, each beside its controls.

    Raises:
        CutawayError: as `evaluate`, and for dictionaries that differ in more than their seed.

    Example:
        >>> judge(lm, [seed_0, seed_1, seed_2], rows).save("judged.html")  # doctest: +SKIP
        PosixPath('judged.html')
    """
    some = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    measured = measure(models, some, rows, spliced_rows=spliced_rows, high_norm=high_norm, seed=seed)
    effects, per_seed = measured.effects(ALL)
    latents = tuple(
        latent_statistics(one, counts, measured.n_tokens) for one, counts in zip(some, measured.counts, strict=True)
    )
    target = None if some[0].writes_what_it_reads else measured.values.y
    control = random_dictionary(some[0], measured.values.x, seed, target)
    control_latents = latent_statistics(control, measured.control_counts[RANDOM][0], measured.n_tokens)
    for name, (effect, each) in _latent_effects(some, latents, control_latents, measured, seed).items():
        effects[name], per_seed[name] = effect, each
    if len(some) > 1:
        alive = [statistics.frequency > 0 for statistics in latents]
        if all(bool(mask.any()) for mask in alive):
            found = stability(some, signed=signed, alive=alive, seed=seed)
            for name, effect in found.effects.items():
                effects[f"stability_{name}"], per_seed[f"stability_{name}"] = effect, found.per_pair[name]
    sides: tuple[Sides, ...] = ()
    if len(some[0].outputs) > 1:
        n = len(some[0].outputs)
        pairs = itertools.combinations(range(n), 2) if n <= 3 else itertools.pairwise(range(n))
        labels = measured.ports.labels()
        x, y = measured.values.x, measured.values.y
        sides = tuple(compare_sides(some[0], x, y, sides=pair, labels=labels, seed=seed) for pair in pairs)
    return Judgement(
        dictionaries=tuple(some),
        effects=effects,
        per_seed=per_seed,
        parts={scope: measured.effects(scope)[0] for scope in measured.trained if scope != ALL},
        latents=latents,
        control_latents=control_latents,
        sides=sides,
        ce=measured.cross_entropies(),
        n_rows=len(rows),
        n_tokens=measured.n_tokens,
        n_spliced=min(spliced_rows, len(rows)),
        values=measured.values,
        notes=(*_idle_ablations(measured), *(warning for one in sides for warning in one.warnings())),
    )


def _idle_ablations(measured: RowSums) -> list[str]:
    """A sentence for each ablation that the model hardly minds: what is recovered of next to nothing says nothing."""
    table = measured.trained[ALL].get("spliced")
    if table is None:
        return []
    found = []
    for ablation in ("zero", "mean"):
        place = SPLICED.index(f"ce_{ablation}")

        def rise(sums: np.ndarray, place: int = place) -> np.ndarray:
            return (sums[..., place] - sums[..., SPLICED.index("ce_clean")]) / sums[..., SPLICED.index("targets")]

        value, (low, _), _ = summary(table[:1], rise)
        if not low > 0:
            found.append(
                f"{ablation} ablation of the site raises the cross-entropy by {value:.3g} nats, no more than chance on "
                "these rows: the share recovered against it means nothing"
            )
    return found


def _latent_effects(
    dictionaries: Sequence[Dictionary],
    latents: Sequence[LatentStatistics],
    control: LatentStatistics,
    measured: RowSums,
    seed: int,
) -> dict[str, tuple[Effect, tuple[float, ...]]]:
    """Dead and dense latents, and how decoders lie, beside random directions."""
    n_latents = dictionaries[0].d_sae
    counts = measured.control_counts[RANDOM]
    tokens = measured.n_tokens
    found = {
        "dead": share_effect(
            f"dead latents: active on none of the {tokens:,} tokens",
            [one.n_dead for one in latents],
            n_latents,
            {RANDOM: (counts == 0).sum(1).tolist()},
        ),
        "dense": share_effect(
            f"dense latents: active on more than {DENSE:.0%} of the {tokens:,} tokens",
            [one.n_dense for one in latents],
            n_latents,
            {RANDOM: (counts.double() / tokens > DENSE).sum(1).tolist()},
        ),
        "nearest_decoder": mean_effect(
            "signed cosine of a decoder row with the nearest other one",
            [one.nearest.double().numpy() for one in latents],
            {RANDOM: [control.nearest.double().numpy()]},
            units="cosine",
        ),
        "decoder_norm": mean_effect(
            "decoder norm",
            [one.decoder_norm.double().numpy() for one in latents],
            {f"{RANDOM} (1 by construction)": [control.decoder_norm.double().numpy()]},
            units="length",
        ),
    }
    if latents[0].encoder_cosine is not None:
        order = torch.randperm(n_latents, generator=torch.Generator().manual_seed(seed))
        shuffled = [
            torch.cosine_similarity(one.W_enc.detach().float().cpu().T[order], one.W_dec.detach().float().cpu(), dim=1)
            for one in dictionaries
        ]
        found["encoder_decoder"] = mean_effect(
            "signed cosine of a latent's encoder and decoder",
            [one.encoder_cosine.double().numpy() for one in latents if one.encoder_cosine is not None],
            {_SHUFFLED: [some.double().numpy() for some in shuffled]},
            units="cosine",
        )
    return found


def by_setting(dictionaries: Mapping[str, Dictionary]) -> list[dict[str, Dictionary]]:
    """Group dictionaries that differ in nothing but their seed.

    They are compared by their training's configuration where it was written down, else by sites, size and selector.

    Args:
        dictionaries: By name.

    Returns:
        The groups, in the order in which they were given.
    """
    groups: dict[str, dict[str, Dictionary]] = {}
    for name, one in dictionaries.items():
        groups.setdefault(_setting(one), {})[name] = one
    return list(groups.values())


def _setting(dictionary: Dictionary) -> str:
    ports = [
        (port.site, port.width, port.model.get("weight_hash")) for port in (*dictionary.inputs, *dictionary.outputs)
    ]
    own: Any = dictionary.metadata.get("training")
    if not own:
        own = {"selector": dictionary.selector.name, "k": getattr(dictionary.selector, "k", None)}
    return json.dumps([dictionary.d_sae, ports, _without_seed(plain(own))], sort_keys=True, default=str)


def _without_seed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_seed(one) for name, one in value.items() if name != "seed"}
    return value
