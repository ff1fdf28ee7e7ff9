"""What saliency maps are worth: the randomised-weights check, agreement between methods, and a deletion test.

- Sanity (Adebayo et al. 2018): the rank correlation between a map of the model and the map of the same prompt after
  its layers, from the top down, and at last everything, were given new random weights. Near zero is good: the map is
  about what was learned. Near one: it would look the same without training.
- Agreement: the rank correlation between two methods' maps of one prompt.
- Deletion (DeYoung et al. 2020's comprehensiveness): how far the metric falls when the tokens that a method ranks
  highest are replaced by the mean embedding, beside as many random tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.draw.charts import effect_html
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel
from cutaway.observe.attribution.answers import Answer, WrongAnswer
from cutaway.observe.random_weights import cascade
from cutaway.observe.saliency_maps.methods import (
    METHODS,
    NOT_SHOWN,
    Baseline,
    Method,
    Question,
    TokenAttribution,
    baseline_vector,
    map_section,
    method_name,
    occluded,
    question,
    saliency_map,
)
from cutaway.observe.summaries import block


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho; NaN for fewer than three tokens or where one side does not vary."""
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    found: Any = spearmanr(a, b)
    return float(found.statistic)


@dataclass(frozen=True)
class Stage:
    """Rank correlation of maps before and after some weights were made random, mean over prompts and seeds."""

    randomised: str
    """What was made random."""
    signed: float
    """Of the maps."""
    magnitude: float
    """Of their magnitudes alone."""
    interval: tuple[float, float]
    """95 % interval of `signed` over prompts."""

    def to_json(self) -> dict[str, Any]:
        return {
            "randomised": self.randomised,
            "signed": self.signed,
            "magnitude": self.magnitude,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class SaliencyChecks:
    """How the maps are checked."""

    untrained_models: int = 2
    """How many untrained models each map is compared with."""
    draws: int = 20
    """How many random sets of tokens stand beside the deletion of the top ones."""
    share: float = 0.25
    """The share of a prompt's tokens that is deleted."""
    seed: int = 0
    """Of untrained weights and random tokens."""


@dataclass(frozen=True)
class MethodReport:
    """One method: its maps and their checks."""

    method: Method
    """The method."""
    maps: tuple[TokenAttribution, ...]
    """One map per prompt."""
    stages: tuple[Stage, ...]
    """Stages of randomisation; the last is everything."""
    deletion: Effect
    """How far the metric falls without the top tokens, beside as many random ones."""
    not_shown: str
    """What the method does not show."""

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "maps": [one.to_json() for one in self.maps],
            "sanity": [stage.to_json() for stage in self.stages],
            "deletion": self.deletion.to_json(),
            "not_shown": self.not_shown,
        }


@dataclass(frozen=True, eq=False, repr=False)
class SaliencyReport(Result):
    """Maps of several methods on the same prompts, with their checks. `print` writes all of it, `repr` the checks."""

    title: ClassVar[str] = "Saliency"

    methods: tuple[MethodReport, ...]
    """One report per method."""
    agreement: dict[tuple[str, str], float]
    """Mean rank correlation of two methods' maps."""
    model: str
    """The model's name."""

    def summary(self) -> str:
        """Each method's checks, and how far the methods agree."""
        n = len(self.methods[0].maps)
        lines = [f"saliency, {self.model}, {n} prompt{'s' if n > 1 else ''}: {self.methods[0].maps[0].what}"]
        for one in self.methods:
            fall, control = one.deletion, one.deletion.controls[0]
            lines += [
                f"  {one.method}: with untrained weights rank correlation {one.stages[-1].signed:+.2f}",
                f"    {fall.name} {fall.figure(2)}, random tokens {control.value:.2f}",
            ]
        return block([*lines, *(f"  {a} and {b}: {value:+.2f}" for (a, b), value in self.agreement.items())])

    def rows(self) -> list[dict[str, Any]]:
        """One row per method, prompt and token."""
        return [
            {"prompt": i, **row} for one in self.methods for i, found in enumerate(one.maps) for row in found.rows()
        ]

    def drawing(self) -> Markup:
        """The tokens tinted method by method, with the checks and the agreement."""
        return sections_html(saliency_sections(self))

    def to_json(self) -> dict[str, Any]:
        pairs = [{"methods": list(pair), "rank_correlation": value} for pair, value in self.agreement.items()]
        return {"model": self.model, "methods": [one.to_json() for one in self.methods], "agreement": pairs}

    def __str__(self) -> str:
        lines = []
        for one in self.methods:
            lines += [str(found) for found in one.maps]
            stages = ", ".join(f"{s.randomised} {s.signed:+.2f} (|·| {s.magnitude:+.2f})" for s in one.stages)
            control = one.deletion.controls[0]
            lines += [
                f"  rank correlation with untrained weights: {stages}",
                f"  {one.deletion.name}: {one.deletion.value:+.2f}, {control.name} {control.value:+.2f}",
                f"  what it does not show: {one.not_shown}",
            ]
        lines += [f"agreement of {a} and {b}: {value:+.2f}" for (a, b), value in self.agreement.items()]
        return "\n".join(lines)


def saliency(
    lm: LanguageModel,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    answer: Answer,
    wrong: WrongAnswer = None,
    *,
    methods: Sequence[Method] = METHODS,
    baseline: Baseline = "mean",
    steps: int | None = None,
    checks: SaliencyChecks | None = None,
) -> SaliencyReport:
    """How much each token of a prompt matters to an answer, by the classical methods, with their checks beside them.

    Gradient × input, integrated gradients (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365) and occlusion;
    the randomised-weights check of Adebayo et al. 2018 (https://arxiv.org/abs/1810.03292), a deletion test, and the
    agreement of the methods. The model is never changed.

    Args:
        lm: the model.
        prompts: texts, or rows of token ids.
        answer: one token for all prompts, or one per prompt.
        wrong: a token whose logit is subtracted, likewise; "mean" is the mean over the vocabulary, None nothing.
        methods: some of "gradient-x-input", "integrated-gradients", "occlusion".
        baseline: of integrated gradients and occlusion: "zero", "pad", "mean", or (occlusion alone) "delete".
        steps: points of the integral; as many as it needs, from 32 to 1024, if None.
        checks: how many untrained models, random draws, ...; the defaults of `SaliencyChecks` if None.

    Returns:
        Maps and checks per method.

    Raises:
        NotSupported: a model that cannot be built anew with random weights.
        CutawayError: an answer that is not one token, an unknown method.

    Example:
        >>> prompt = "The capital of the state containing Dallas is"
        >>> saliency(cutaway.load("atlas"), prompt, " Austin", steps=64)  # doctest: +SKIP
        saliency, atlas, 1 prompt: logit of ' Austin'
        ...
    """
    checks = checks or SaliencyChecks()
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not methods or any(method not in METHODS for method in methods):
        unknown = ", ".join(repr(m) for m in methods if m not in METHODS)
        raise CutawayError(f"There is no saliency method {unknown or '(none)'}; use some of {', '.join(METHODS)}.")
    if baseline == "delete" and "integrated-gradients" in methods:
        raise CutawayError(
            "Deleting tokens is a baseline of occlusion alone; integrated gradients take zero, pad, mean."
        )
    asked = [
        question(lm, text, a, w)
        for text, a, w in zip(texts, _each(answer, len(texts)), _each(wrong, len(texts)), strict=True)
    ]
    maps: dict[Method, list[TokenAttribution]] = {
        m: [saliency_map(lm, one, m, baseline=baseline, steps=steps) for one in asked] for m in methods
    }
    stages = _sanity(lm, asked, maps, baseline, steps, checks)
    reports = [
        MethodReport(
            method,
            tuple(maps[method]),
            tuple(stages[method]),
            deletion(lm, asked, maps[method], checks),
            NOT_SHOWN[method],
        )
        for method in methods
    ]
    agreement = {
        (a, b): _mean([rank_correlation(x.values, y.values) for x, y in zip(maps[a], maps[b], strict=True)])
        for i, a in enumerate(methods)
        for b in methods[i + 1 :]
    }
    return SaliencyReport(tuple(reports), agreement, lm.name)


def _each(value: Answer | WrongAnswer, n: int) -> list[Any]:
    if value is None or isinstance(value, (str, int)):
        return [value] * n
    given = list(value)
    if len(given) != n:
        raise CutawayError(f"{len(given)} answers for {n} prompts; give one, or one for each prompt.")
    return given


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _sanity(
    lm: LanguageModel,
    asked: Sequence[Question],
    maps: dict[Method, list[TokenAttribution]],
    baseline: Baseline,
    steps: int | None,
    checks: SaliencyChecks,
) -> dict[Method, list[Stage]]:
    """Every method's correlation with its own maps, stage by stage of the cascade."""
    signed: dict[tuple[Method, str], list[list[float]]] = {}
    magnitude: dict[tuple[Method, str], list[list[float]]] = {}
    with Progress("randomising weights", None, unit="models") as progress:
        for draw in range(checks.untrained_models):
            for stage, model in cascade(lm, checks.seed + draw):
                for method, trained in maps.items():
                    # what the integral needed in the trained model is enough to compare ranks by
                    points = max((t.steps or 32 for t in trained), default=32) if steps is None else steps
                    found = [
                        saliency_map(model, one, method, baseline=baseline, steps=min(points, 128)) for one in asked
                    ]
                    pairs = list(zip(trained, found, strict=True))
                    signed.setdefault((method, stage), []).append(
                        [rank_correlation(a.values, b.values) for a, b in pairs]
                    )
                    magnitude.setdefault((method, stage), []).append(
                        [rank_correlation(np.abs(a.values), np.abs(b.values)) for a, b in pairs]
                    )
                progress.advance(note=stage)
    return {
        method: [
            Stage(
                stage,
                _mean(np.ravel(rows).tolist()),
                _mean(np.ravel(magnitude[m, stage]).tolist()),
                _over_prompts(rows),
            )
            for (m, stage), rows in signed.items()
            if m == method
        ]
        for method in maps
    }


def _over_prompts(rows: list[list[float]]) -> tuple[float, float]:
    """Interval of the mean over prompts, each prompt averaged over seeds [seeds][prompts]."""
    each = np.array(rows, dtype=float)
    if np.isnan(each).all(0).any():
        each = each[:, ~np.isnan(each).all(0)]
    return bootstrap_interval(np.nanmean(each, axis=0)) if each.size else (float("nan"), float("nan"))


def deletion(
    lm: LanguageModel,
    asked: Sequence[Question],
    maps: Sequence[TokenAttribution],
    checks: SaliencyChecks,
) -> Effect:
    """How far the metric falls when the top share of tokens of each map get the mean embedding, all at once (the
    comprehensiveness of DeYoung et al. 2020).

    The control replaces as many random tokens, several times. A beginning-of-text is neither ranked nor drawn.
    """
    share, draws = checks.share, checks.draws
    vector = baseline_vector(lm, "mean")
    generator = np.random.default_rng(checks.seed)
    falls, control = [], []
    for one, found in zip(asked, maps, strict=True):
        places = [i for i, token in enumerate(one.ids) if not (i == 0 and token == lm.bos_id)]
        k = max(1, round(share * len(places)))
        top = sorted(places, key=lambda i: -found.values[i])[:k]
        drawn = [sorted(generator.choice(places, size=k, replace=False).tolist()) for _ in range(draws)]
        after = occluded(lm, one, [sorted(top), *drawn], vector).double().cpu().numpy()
        fall = found.value - after
        falls.append(float(fall[0]))
        control.append(float(fall[1:].mean()))
    return Effect(
        name=f"fall without the top {share:.0%} of tokens",
        value=float(np.mean(falls)),
        n=len(falls),
        interval=bootstrap_interval(falls) if len(falls) > 1 else None,
        controls=(
            Control(
                "as many random tokens",
                float(np.mean(control)),
                bootstrap_interval(control) if len(control) > 1 else None,
                draws,
            ),
        ),
        ablation="embedding replaced by the mean embedding",
        units="logits",
    ).require_controls()


def saliency_sections(report: SaliencyReport) -> list[Section]:
    """Tokens tinted by attribution, method by method, with the sanity check, the deletion test and agreement."""
    sections: list[Section] = []
    for one in report.methods:
        sections += [map_section(one.maps, one.method, one.not_shown), _checks(one)]
    if report.agreement:
        rows = [[a, b, f"{value:+.2f}"] for (a, b), value in report.agreement.items()]
        table = table_html(columns=["method", "and", "rank correlation"], rows=rows, title="agreement")
        text = "Rank correlation between two methods' maps of the same prompt."
        sections.append(("Do the methods agree?", text, table))
    return sections


def _checks(one: MethodReport) -> Section:
    stages = table_html(
        columns=["given new random weights", "rank correlation", "of magnitudes"],
        rows=[[s.randomised, f"{s.signed:+.2f}", f"{s.magnitude:+.2f}"] for s in one.stages],
        title=f"{one.method} under randomised weights",
    )
    n = len(one.maps[0].tokens)
    text = (
        "Rank correlation between the map and the same prompt's map after layers got new random weights, from the top "
        f"down, and at last everything. Near 1 means that the map is not about what was learned. With {n} tokens, "
        f"unrelated maps differ from 0 by about {1 / max(1, n - 1) ** 0.5:.2f}."
    )
    fall = Markup("<p>Taking away the tokens that it ranks highest:</p>") + effect_html(one.deletion.to_json())
    return f"{method_name(one.method)}: would it look the same without training?", text, stages + fall
