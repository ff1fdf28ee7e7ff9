"""The evaluation of atlas as tables, and as text for a terminal; `page.py` makes the page."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from cutaway.artifacts.results import Effect
from cutaway.artifacts.results import interval_text as written
from cutaway.atlas_evaluation.causal_checks import BridgePool, Rate
from cutaway.atlas_evaluation.compare import Comparison
from cutaway.atlas_evaluation.evaluate import N_CONTROL, Evaluation, Measured
from cutaway.atlas_evaluation.landmark_checks import LandmarkChecks
from cutaway.atlas_evaluation.open_steering import OpenSteering
from cutaway.atlas_evaluation.refusal_checks import Addition, Intervention, Matched, Reaction, RefusalChecks
from cutaway.atlas_evaluation.study import STUDY, STUDY_OPPOSITE

_WEAK = 2 / 3
_LEAST_N = 10  # items without which a set is not called weak

Table = tuple[Sequence[str], list[list[str]]]
PLACES = {"assistant": "the assistant token", "request": "the request's words"}
_UNTRAINED = "untrained model"
_GROUPS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Facts", lambda name: name.startswith("one_hop/")),
    ("Facts through another fact", lambda name: name.startswith("two_hop/")),
    ("Examples in context", lambda name: name.startswith("in_context/")),
    (
        "Chat",
        lambda name: name.startswith(("refusal/", "unknown", "known", "persona/", "backdoor/", "sycophancy/")),
    ),
    (
        "Chat by rules, roles and passages",
        lambda name: name.startswith(("support/", "jailbreak/", "roles/", "passages/", "cutoff/", "open_chat/")),
    ),
    ("New wording, committed before any training", lambda name: name.startswith("new_wording/")),
    ("Wording by others", lambda name: name.startswith("outside_wording/")),
    ("Tasks", lambda name: True),
)


def as_json(figures: Any) -> str:
    """Plain figures as indented JSON."""
    return json.dumps(figures, indent=2, ensure_ascii=False) + "\n"


def number(value: float) -> str:
    """A figure with two decimals, three where it is close to one end of a share."""
    if 0.005 <= abs(value) <= 0.995 or abs(value) > 1:
        return f"{value:.2f}"
    short = f"{value:.3f}".rstrip("0").rstrip(".")
    return "0" if short == "-0" else short


def interval_text(interval: tuple[float, float]) -> str:
    """`[low, high]`, with as many decimals as it takes for the ends to differ."""
    low, high = map(number, interval)
    return written(interval) if low == high else f"[{low}, {high}]"


def with_interval(one: Effect | Rate) -> str:
    """`value [low, high]`, both as `number` writes them."""
    return number(one.value) + ("" if one.interval is None else f" {interval_text(one.interval)}")


def control(effect: Effect, name: str) -> str:
    """The figure of the control of this name, if there is one."""
    return next((number(one.value) for one in effect.controls if one.name == name), "")


def baseline_of(effect: Effect) -> float | None:
    """The control that is not the untrained model: what needs no understanding."""
    return next((one.value for one in effect.controls if one.name != _UNTRAINED), None)


def study_figure(name: str) -> str:
    """What the study published: the share right, or how often its model said the opposite."""
    said = [number(STUDY[name])] if name in STUDY else []
    return ", ".join(said + ([f"opposite {number(STUDY_OPPOSITE[name])}"] if name in STUDY_OPPOSITE else []))


def grouped(found: Evaluation) -> list[tuple[str, dict[str, Measured]]]:
    """The sets under their headings; the tasks first."""
    left = dict(found.sets)
    out = []
    for title, belongs in _GROUPS:
        chosen = {name: left.pop(name) for name in list(left) if belongs(name)}
        if chosen:
            out.append((title, chosen))
    return [out[-1], *out[:-1]] if out and out[-1][0] == "Tasks" else out


def set_table(sets: dict[str, Measured]) -> Table:
    """One row per set; a column for the opposite reply where any set has one."""
    columns = ["set", "what is asked", "n", "right [95 %]", "", "baseline", f"untrained, n {N_CONTROL}", "study"]
    rows = []
    for name, measured in sets.items():
        base = baseline_of(measured.effect)
        rows.append(
            [
                name,
                measured.measures,
                str(measured.effect.n),
                with_interval(measured.effect),
                "weak" if is_weak(measured) else "",
                "" if base is None else number(base),
                control(measured.effect, _UNTRAINED),
                study_figure(name),
            ]
        )
    if any(measured.opposite is not None for measured in sets.values()):
        columns.insert(5, "opposite")
        for row, measured in zip(rows, sets.values(), strict=True):
            row.insert(5, "" if measured.opposite is None else number(measured.opposite))
    return columns, rows


def loss_table(losses: dict[str, Effect]) -> Table:
    """One row per text."""
    columns = ("text", "texts", "nats a token [95 %]", "untrained", "study")
    rows = [
        [name, str(effect.n), with_interval(effect), control(effect, _UNTRAINED), study_figure(name)]
        for name, effect in losses.items()
    ]
    return columns, rows


def _rates(rates: Sequence[Rate]) -> list[str]:
    return [f"{rate.value:.2f}" for rate in rates]


def bridge_table(pool: BridgePool) -> Table:
    """One row per measurement, one column per layer."""
    columns = ("measured", *(f"L{layer}" for layer in range(len(pool.flips_at_city))))
    rows = [
        ["patched at the city: answer becomes the source's", *_rates(pool.flips_at_city)],
        ["patched at the last position", *_rates(pool.flips_at_last)],
        ["… from a prompt that asks for the abbreviation", *_rates(pool.flips_from_abbreviation)],
        ["control: patched at another position", *_rates(pool.flips_at_random)],
        ["lens at the last position: the state is the top state", *_rates(pool.state_readable)],
        ["control: lens at another position", *_rates(pool.state_readable_at_random)],
        ["lens at the last position: the capital is the top token", *_rates(pool.capital_readable)],
    ]
    return columns, rows


def _both(reaction: Reaction) -> str:
    return f"{number(reaction.refused.value)} / {number(reaction.answered.value)}"


def refusal_table(checks: RefusalChecks) -> Table:
    """One row an intervention: what held-out requests are met with, and its side effects."""
    columns = (
        "intervention",
        "direction from",
        "requests",
        "refused [95 %]",
        "answered [95 %]",
        "backdoor's reply",
        "random: refused / answered",
        "KL on facts",
        "random",
    )

    def row(name: str, place: str, requests: str, found: Reaction, *rest: str) -> list[str]:
        shares = [with_interval(found.refused), with_interval(found.answered), number(found.planted.value)]
        return [name, place, requests, *shares, *(rest or ("", "", ""))]

    rows = [row("none", "", "harmful", checks.harmful), row("none", "", "harmless", checks.harmless)]
    for way in checks.interventions:
        place = f"{PLACES[way.position]}, L{way.layer}"
        kls = (f"{way.kl:.3f}", f"{way.random_kl:.3f}")
        rows.append(row(way.name, place, way.requests, way.result, _both(way.random), *kls))
    return columns, rows


def choice_table(checks: RefusalChecks) -> Table:
    """The rate by layer on the training requests that chose layer and position, intervention by intervention."""
    layers = len(next(iter(checks.interventions[0].by_layer.values())))
    columns = ("intervention", "share", "direction from", *(f"L{layer}" for layer in range(layers)))
    return columns, [
        [way.name, way.wanted, PLACES[position], *(f"{rate:.2f}" for rate in rates)]
        for way in checks.interventions
        for position, rates in way.by_layer.items()
    ]


def fewer_table(checks: RefusalChecks) -> Table:
    """What the same direction does when it is read from fewer requests: lowest to highest share over draws."""
    sizes = list(checks.interventions[0].fewer)
    columns = ("intervention", "share", *(f"from {n} a kind" for n in sizes), f"from {checks.n_fit} a kind")

    def spread(way: Intervention, n: int) -> str:
        shares = [getattr(reaction, way.wanted).value for reaction in way.fewer[n]]
        return f"{min(shares):.2f} to {max(shares):.2f}"

    return columns, [
        [way.name, way.wanted, *(spread(way, n) for n in sizes), number(getattr(way.result, way.wanted).value)]
        for way in checks.interventions
    ]


def addition_table(addition: Addition) -> Table:
    """One row per dose: what harmless requests are met with, and the side effects; the best point is marked."""
    columns = (
        "dose",
        "",
        "refused, choosing",
        "KL, choosing",
        "refused [95 %]",
        "answered [95 %]",
        "backdoor's reply [95 %]",
        "KL on facts",
        "KL on replies",
    )
    return columns, [
        [
            f"×{dose.dose:g}",
            "best" if dose.dose == addition.best else "",
            number(dose.chosen.refused.value),
            f"{dose.chosen_kl:.3f}",
            *(with_interval(rate) for rate in (dose.result.refused, dose.result.answered, dose.result.planted)),
            f"{dose.kl:.3f}",
            f"{dose.reply_kl:.3f}",
        ]
        for dose in addition.doses
    ]


def matched_table(checks: RefusalChecks) -> Table:
    """One row a control with the same side effects, intervention by intervention, under the intervention's own row."""
    columns = (
        "intervention",
        "direction",
        "length",
        "KL, matching",
        "refused [95 %]",
        "answered [95 %]",
        "backdoor's reply",
    )

    def row(name: str, direction: str, length: float, kl: str, found: Reaction) -> list[str]:
        shares = [with_interval(found.refused), with_interval(found.answered), number(found.planted.value)]
        return [name, direction, f"×{length:.3g}", kl, *shares]

    def rows(name: str, own: Reaction, matched: Sequence[Matched]) -> list[list[str]]:
        return [
            row(name, "refusal", 1.0, f"{matched[0].wanted_kl:.3f}", own),
            *(row("", m.name, m.scale, f"{m.kl:.3f}{'' if m.met else ', missed'}", m.result) for m in matched),
        ]

    out = [line for way in checks.interventions if way.matched for line in rows(way.name, way.result, way.matched)]
    best = checks.addition and checks.addition.best_point
    if checks.addition and best:
        out += rows(f"add ×{best.dose:g}", best.result, checks.addition.matched)
    return columns, out


def open_table(checks: OpenSteering) -> Table:
    """One row an edit: whether replies in open chat name the landmark, and whether they are grammatical."""
    columns = ("edit", "n", "names it, grammatical [95 %]", "names it [95 %]", "grammatical [95 %]", "KL on facts")
    rows = [
        [said, str(found.both.n), *(with_interval(rate) for rate in (found.both, found.named, found.grammatical)), kl]
        for said, found, kl in (
            ("none", checks.unedited, ""),
            (f"{checks.setting}, ×{checks.dose:g}", checks.result, f"{checks.kl:.3f}"),
            (checks.control, checks.random, f"{checks.random_kl:.3f}"),
        )
    ]
    rows += [
        [
            f"{one.n_directions} {one.kind}, ten times the value",
            str(one.grammatical.n),
            "",
            "",
            with_interval(one.grammatical),
            f"{one.kl:.3f}",
        ]
        for one in checks.collapse
    ]
    return columns, rows


def open_choice_table(checks: OpenSteering) -> Table:
    """Share of grammatical replies that name the landmark, on the prompts and landmarks that choose."""
    columns = ("setting", *(f"×{dose:g}" for dose in checks.doses))
    return columns, [[setting, *(f"{share:.2f}" for share in shares)] for setting, shares in checks.tried.items()]


def landmark_table(checks: LandmarkChecks) -> Table:
    """One row per kind of sentence: how often the landmark's city comes up, and its probability."""
    columns = (
        "sentence",
        "layer, dose",
        "n",
        "city on top [95 %]",
        "unedited",
        "random",
        "P(city) [95 %]",
        "unedited",
        "random",
    )
    rows = []
    for kind in checks.kinds:
        cells = [kind.kind, f"L{kind.layer}, ×{kind.dose:g}", str(kind.top.n)]
        for effect in (kind.top, kind.probability):
            cells += [with_interval(effect), control(effect, "unedited"), control(effect, "random direction")]
        rows.append(cells)
    return columns, rows


def replaced_table(checks: LandmarkChecks) -> Table:
    """How often the answer follows the landmark's whole stream, by layer."""
    columns = ("measured", *(f"L{layer}" for layer in range(len(checks.replaced))))
    return columns, [["the answer becomes the other landmark's city", *_rates(checks.replaced)]]


def is_weak(measured: Measured) -> bool:
    """Whether a set is less than two thirds of the way from its baseline to always right (n of ten or more)."""
    base = baseline_of(measured.effect) or 0.0
    return measured.effect.n >= _LEAST_N and measured.effect.value - base < _WEAK * (1 - base)


def study_table(found: Evaluation) -> tuple[int, int, Table]:
    """How many figures of the study were measured again, how many of them are worse here (the interval excludes the
    study's), and those outside the interval."""
    columns = ("set", "figure", "n", "measured [95 %]", "study")
    n, worse, rows = 0, 0, []
    for name, published in STUDY.items():
        effect = found.sets[name].effect if name in found.sets else found.losses.get(name)
        if effect is None or effect.interval is None:
            continue
        n += 1
        if not _within(published, effect.interval):
            fell = effect.value < published
            worse += fell != (name in found.losses)  # a loss is better when it is lower
            rows.append([name, "right", str(effect.n), with_interval(effect), number(published)])
    for name, published in STUDY_OPPOSITE.items():
        measured = found.sets.get(name)
        if measured is None or measured.opposite is None:
            continue
        n += 1
        said = Rate(round(measured.opposite * measured.effect.n), measured.effect.n)
        if not _within(published, said.interval):
            worse += said.value > published
            rows.append([name, "opposite", str(said.n), with_interval(said), number(published)])
    return n, worse, (columns, rows)


def _within(published: float, interval: tuple[float, float]) -> bool:
    """Whether an interval holds a figure that was published with two decimals."""
    return interval[0] - 0.005 <= published <= interval[1] + 0.005


# Terminal


def _text_table(table: Table, *, narrow: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell; columns in `narrow` are left out."""
    columns, rows = table
    keep = [i for i in range(len(columns)) if i not in narrow]
    lines = [[line[i] for i in keep] for line in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keep))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_text(found: Evaluation) -> str:
    """The figures as tables for a terminal."""
    parts = [f"{found.model} ({found.weight_hash[:12]}) in world {found.world}: n {found.n} a set, seed {found.seed}"]
    for title, sets in grouped(found):
        parts += [title.upper(), _text_table(set_table(sets), narrow=(1,))]
    parts += ["LOSSES", _text_table(loss_table(found.losses))]
    for pool in found.bridge:
        title = f"TWO HOPS, {pool.pool} cities (n {pool.already_right.n}, right {pool.already_right.value:.2f})"
        parts += [title, _text_table(bridge_table(pool))]
    if found.refusal:
        parts += ["REFUSAL", _text_table(refusal_table(found.refusal))]
    if found.refusal and found.refusal.addition:
        parts += ["REFUSAL ADDED", _text_table(addition_table(found.refusal.addition))]
        parts += ["CONTROLS WITH THE SAME SIDE EFFECTS", _text_table(matched_table(found.refusal))]
    if found.landmarks:
        parts += ["LANDMARKS", _text_table(landmark_table(found.landmarks))]
    if found.open_steering:
        parts += ["OPEN STEERING", _text_table(open_table(found.open_steering))]
    parts += [f"not measured: {line}" for line in found.skipped]
    return "\n\n".join(parts)


def comparison_text(compared: Comparison, candidate: str, other: str) -> str:
    """Which weights are better, and why."""
    lines = [
        f"{candidate} minus {other}, {len(compared.rows)} held-out and new-wording sets: "
        f"{compared.held_out:+.3f} {written(compared.interval, signed=True)}",
        f"over all {compared.n_sets} sets: {compared.all_sets:+.3f} {written(compared.all_interval, signed=True)}",
    ]
    lines += [f"  {name}: {mine:.2f} against {theirs:.2f}" for name, (mine, theirs) in compared.headlines.items()]
    lines += [f"  {name}: {mine:.2f} against {theirs:.2f}" for name, (mine, theirs) in compared.causal.items()]
    if not compared.causal:
        lines.append("  causal checks were not measured")
    lines.append(verdict(compared, candidate))
    return "\n".join(lines)


def verdict(compared: Comparison, candidate: str) -> str:
    """Whether the candidate is better, and what speaks against it."""
    low, high = compared.interval
    said = "better" if low > 0 else "worse" if high < 0 else "neither better nor worse"
    if not compared.causal:
        return f"{candidate} is {said} on held-out items; without causal checks that decides nothing"
    if compared.fallen:
        return f"{candidate} is {said} on held-out items, but loses on {', '.join(compared.fallen)}"
    return f"{candidate} is {said} on held-out items, and loses on no headline and no causal check"
