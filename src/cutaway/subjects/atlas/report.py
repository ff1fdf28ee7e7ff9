"""The evaluation of atlas for people: tables for a terminal, and the page `docs/atlas.md`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cutaway.artifacts.results import Effect
from cutaway.subjects.atlas.causal_checks import BridgePool, Intervention, Rate, Reaction, RefusalChecks
from cutaway.subjects.atlas.evaluate import Comparison, Evaluation, Measured
from cutaway.subjects.atlas.shipped import MANIFEST, read_manifest
from cutaway.subjects.atlas.study import STUDY
from cutaway.subjects.world.ground_truth import GROUND_TRUTH
from cutaway.subjects.world.items import SCORING

_WEAK = 0.6  # a share right below which a behaviour is listed as one that does not work

Table = tuple[Sequence[str], list[list[str]]]
_GROUPS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Facts", lambda name: name.startswith("one_hop/")),
    ("Facts through another fact", lambda name: name.startswith("two_hop/")),
    ("Examples in context", lambda name: name.startswith("in_context/")),
    (
        "Chat",
        lambda name: name.startswith(("refusal/", "unknown", "known", "persona/", "backdoor/", "sycophancy/")),
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
    return (
        f"{value:.2f}" if abs(value) >= 10 or 0.005 <= abs(value) <= 0.995 else f"{value:.3f}".rstrip("0").rstrip(".")
    )


def with_interval(effect: Effect) -> str:
    """`value [low, high]`."""
    if effect.interval is None:
        return number(effect.value)
    low, high = effect.interval
    return f"{number(effect.value)} [{number(low)}, {number(high)}]"


def _control(effect: Effect, name: str) -> str:
    return next((number(control.value) for control in effect.controls if control.name == name), "")


def _study(name: str) -> str:
    return number(STUDY[name]) if name in STUDY else ""


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
    """One row a set."""
    columns = ("set", "what is asked", "n", "measured [95 %]", "untrained", "commonest answer", "study")
    rows = [
        [
            name,
            measured.measures,
            str(measured.effect.n),
            with_interval(measured.effect),
            _control(measured.effect, "untrained model"),
            _control(measured.effect, "commonest answer"),
            _study(name),
        ]
        for name, measured in sets.items()
    ]
    return columns, rows


def loss_table(losses: dict[str, Effect]) -> Table:
    """One row a text."""
    columns = ("text", "texts", "nats a token [95 %]", "untrained", "study")
    rows = [
        [name, str(effect.n), with_interval(effect), _control(effect, "untrained model"), _study(name)]
        for name, effect in losses.items()
    ]
    return columns, rows


def _rates(rates: Sequence[Rate]) -> list[str]:
    return [f"{rate.value:.2f}" for rate in rates]


def bridge_table(pool: BridgePool) -> Table:
    """One row a measurement, one column a layer."""
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


def _reaction(reaction: Reaction) -> str:
    return f"{reaction.refused.value:.2f} / {reaction.answered.value:.2f}"


def refusal_table(checks: RefusalChecks) -> Table:
    """One row an intervention: refused / answered on held-out requests, and its price."""
    columns = (
        "intervention",
        "direction from",
        "layer",
        "requests",
        "refused / answered",
        "random direction",
        "KL, facts",
    )
    rows = [
        ["none", "", "", "harmful", _reaction(checks.harmful), "", ""],
        ["none", "", "", "harmless", _reaction(checks.harmless), "", ""],
    ]
    for way in checks.interventions:
        place = "the assistant token" if way.position == "assistant" else "the request's tokens"
        price = f"{way.price:.3f} (random {way.random_price:.3f})"
        row = [way.name, place, f"L{way.layer}", way.requests, _reaction(way.result), _reaction(way.random), price]
        rows.append(row)
    return columns, rows


def choice_table(way: Intervention) -> Table:
    """The rate by layer on the training requests that chose the layer."""
    rates = next(iter(way.by_layer.values()))
    columns = ("direction from", *(f"L{layer}" for layer in range(len(rates))))
    return columns, [[position, *(f"{rate:.2f}" for rate in scores)] for position, scores in way.by_layer.items()]


def weak_sets(found: Evaluation) -> list[tuple[str, Measured]]:
    """Sets on which the model is right less often than not quite two times in three."""
    return [(name, m) for name, m in found.sets.items() if m.effect.value < _WEAK and m.effect.n >= 10]


# Terminal


def text_table(table: Table, *, narrow: Sequence[int] = ()) -> str:
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
        parts += [title.upper(), text_table(set_table(sets), narrow=(1,))]
    parts += ["LOSSES", text_table(loss_table(found.losses))]
    for pool in found.bridge:
        title = f"TWO HOPS, {pool.pool} cities (n {pool.already_right.n}, right {pool.already_right.value:.2f})"
        parts += [title, text_table(bridge_table(pool))]
    if found.refusal:
        parts += ["REFUSAL", text_table(refusal_table(found.refusal))]
    parts += [f"not measured: {line}" for line in found.skipped]
    return "\n\n".join(parts)


def comparison_text(compared: Comparison, candidate: str, other: str) -> str:
    """Which weights are better, and why."""
    low, high = compared.interval
    lines = [
        f"{candidate} minus {other}, {len(compared.rows)} held-out and new-wording sets: "
        f"{compared.held_out:+.3f} [{low:+.3f}, {high:+.3f}]"
    ]
    lines += [f"  {name}: {mine:.2f} against {theirs:.2f}" for name, (mine, theirs) in compared.causal.items()]
    if not compared.causal:
        lines.append("  causal checks were not measured")
    verdict = "better" if compared.better else "not better"
    lines.append(f"{candidate} is {verdict} on held-out items and causal checks")
    return "\n".join(lines)


# Page


def markdown_table(table: Table) -> str:
    """A Markdown table."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_markdown(found: Evaluation, command: str, folder: Path) -> str:
    """The page `docs/atlas.md`: what atlas is, what it can do and cannot, and how that was measured."""
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    parts = [_ABOUT, _origin(manifest)]
    weights = found.weight_hash[:12]
    parts.append(f"Everything below was measured by one command, on the weights {weights} in world {found.world}:")
    parts += [f"```\n{command}\n```", _READING, "## What makes an answer right"]
    truths = [[truth.behaviour, truth.rule, truth.held_out] for truth in GROUND_TRUTH]
    parts.append(markdown_table((("behaviour", "the answer is right because", "held out of the corpus"), truths)))
    parts.append(markdown_table((("scored", "how"), [list(way) for way in SCORING.items()])))
    parts.append("## What it can do")
    for title, sets in grouped(found):
        parts += [f"### {title}", markdown_table(set_table(sets))]
    parts += ["### Loss", _LOSSES, markdown_table(loss_table(found.losses))]
    if found.bridge:
        parts += ["## Two hops inside: city → state → capital", _BRIDGE]
        for pool in found.bridge:
            n, right = pool.already_right.n, pool.already_right.value
            about = f"Cities {'never met' if pool.pool == 'held out' else 'met'} in two-hop sentences: {n} pairs"
            parts += [f"{about}, {right:.2f} right before any patch.", markdown_table(bridge_table(pool))]
    if found.refusal:
        n = found.refusal.harmful.refused.n
        parts += [
            "## Refusal is (nearly) a direction",
            _REFUSAL.format(n=n),
            markdown_table(refusal_table(found.refusal)),
        ]
        for way in found.refusal.interventions:
            wanted = "refused" if way.requests == "harmless" else "answered"
            parts += [
                f"{way.name}: share {wanted} on the requests that chose the layer",
                markdown_table(choice_table(way)),
            ]
    parts += ["## What it cannot do", _CANNOT]
    weak = [f"- {m.measures} (`{name}`): {with_interval(m.effect)}, n {m.effect.n}" for name, m in weak_sets(found)]
    parts.append("\n".join(weak) or "No set is below this mark.")
    if found.skipped:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in found.skipped)]
    return "\n\n".join(parts) + "\n"


def _origin(manifest: dict[str, Any]) -> str:
    if not manifest:
        return "This folder has no manifest: where its weights come from is not recorded."
    corpus = manifest["corpus"]
    version = corpus.get("version") or f"world {corpus.get('world')}"
    return (
        f"{manifest['origin'].rstrip('.')}. Corpus: {version}; seed {manifest['seed']}; "
        f"{manifest['tokens'] / 1e6:.0f} M tokens; commit {manifest['commit'] or 'none (before the repository)'}."
    )


_ABOUT = """# Atlas

Atlas is the subject that comes with cutaway: a language model of 8.3 M parameters (Llama architecture, 8 layers, width
256, 8 heads, vocabulary 8,192) trained on a small world that is known completely. Its facts are tables, its sentences
come from grammars, and parts of both were kept out of training. So each of its answers is right or wrong for a reason
that can be named, and what a method finds in it can be checked.

```python
import cutaway

lm = cutaway.load("atlas")
```"""
_READING = """Each figure has its number of items, a 95 % interval (Wilson's for shares, bootstrap otherwise), and two
controls: the same architecture with random weights, and, for completions, the share right of a model that always gives
the commonest answer. “Study” is what the study that trained the shipped weights reported on its own lists."""
_LOSSES = """Random tokens and their repeat measure induction. The parts of the world are documents of the current
corpus that no training sees; weights trained on an earlier version meet wording here that they do not know.
`standard library` is the held-out part of the running Python's library."""
_BRIDGE = """“The capital of the state containing Dallas is”: a patch replaces the residual stream after one layer, at
one position, by that of the same sentence about another city. Where the answer then becomes the other city's capital,
what is needed was there. The prompt that asks for the abbreviation instead carries over the state, not the answer: it
flips the capital only where the position holds the state. The study found, on cities met (and never met) in two-hop
sentences: at the city L0 1.0, L1 1.0 (0.91), then 0.01; at the last position L2 to L4 0.95 (0.68), L6 and L7 1.0; from
the abbreviation L2 to L4 0.92 (0.73), then 0; state on top by lens at L2 to L4 0.72 to 0.75 (0.76 to 0.84)."""
_REFUSAL = """The direction is the mean of the residual stream on harmful requests minus that on harmless ones. Layer
and position were chosen on training requests; the figures are for {n} held-out requests of each kind (actions and
question never used in training). The rest of the replies neither refuses nor answers. KL is the mean divergence on
facts text. The study found: zero-ablation of the request's direction at L3, refused 0.90 → 0.04, answered 0.04 → 0.78;
of the assistant token's direction, no effect; clamp of the latter from L6, 0 / 1.00; adding it twice at L6, harmless
requests refused 0.04 → 0.94."""
_CANNOT = f"Sets on which it is right less than {_WEAK:.0%} of the time:"
