"""A whole tour result for the page's tests: every kind of block, odd tokens, missing values. Invented numbers."""

import math
import random

from cutaway.draw.blocks import (
    Bar,
    Bars,
    Block,
    Card,
    Compare,
    Continuation,
    EffectBlock,
    Example,
    Fact,
    Features,
    Figure,
    Figures,
    Heatmap,
    Latent,
    Lens,
    Line,
    Section,
    SelfTest,
    Series,
    Table,
    Text,
    TokenEffect,
    TokenRow,
    Tokens,
    TourResult,
)

NASTY = [
    "<|user|>",
    "</script>",
    "\"quoted'",
    "\n",
    "\t",
    " ",
    "",
    " Çığ",
    "İstanbul",
    "👩‍🚀",
    "\x00",
    "\x1b[31m",
    "\x85",
    "\u202etxt",
    "\ud800",
    "&amp;",
    "{{ 7*7 }}",
    "`code`",
    "<!--",
    "]]>",
    "\u0301",
    "\u200d",
    "\xa0",
    "\ufeff",
]


def effect(name: str = "Patch the city's position at block 1") -> dict:
    return {
        "name": name,
        "value": 0.94,
        "n": 100,
        "interval": [0.88, 0.98],
        "controls": [
            {"name": "random position, same block", "value": 0.02, "interval": [0.0, 0.05], "n": 100},
            {"name": "random direction of equal norm", "value": -0.01, "interval": None, "n": 100},
        ],
        "ablation": "patch from the clean run",
        "units": "share of answers that flip",
        "command": "cutaway tour atlas --only patching",
    }


def sample() -> TourResult:
    rng = random.Random(0)
    tokens = ["<|endoftext|>", "The", " capital", " of", " the", " state", " containing", " Dallas", " is"]
    layers = [f"block {layer}" for layer in range(8)]

    lens_top = [
        [rng.choice([" the", " state", " of", " Texas", "\n", " is", "</s>"]) for _ in tokens[:-1]]
        + [[" the", " a", " Texas", " Texas", " Texas", " Austin", " Austin", " Austin"][layer]]
        for layer in range(8)
    ]
    lens_probability = [
        [round(rng.random() ** 2, 3) for _ in tokens[:-1]] + [[0.08, 0.11, 0.72, 0.78, 0.78, 0.93, 0.97, 1.0][layer]]
        for layer in range(8)
    ]
    patch = [[rng.gauss(0, 0.02) for _ in tokens] for _ in range(8)]
    for layer in range(8):
        patch[layer][7] = 1.0 if layer < 2 else 0.01
        patch[layer][8] = [0.0, 0.02, 0.95, 0.96, 0.95, 0.9, 1.0, 1.0][layer]
    patch_cells: list[list[float | None]] = [list(row) for row in patch]
    patch_cells[3][0] = None

    sections = (
        Section(
            id="lens",
            title="Logit lens",
            question="Where does the answer appear?",
            lead="At every block the residual stream is read as if it were the last one. The state comes first, at "
            "block 2, and its capital only at block 5: the model takes two steps.",
            note="The lens reads what is linearly visible to the last layer; what it does not show may be there.",
            blocks=(
                Figures(
                    items=(
                        Figure(label="answer is the top token from", value="block 5", detail="of 8 blocks"),
                        Figure(
                            label="items answered right", value=94.0, units="%", detail="94 of 100, held-out cities"
                        ),
                        Figure(label="median rank before block 5", value=12),
                        Figure(label="probability at the end", value=0.9981),
                    )
                ),
                Lens(
                    layers=tuple(layers),
                    tokens=tuple(tokens),
                    top=tuple(map(tuple, lens_top)),
                    probability=tuple(map(tuple, lens_probability)),
                    caption="The most probable token at each block and position; colour is its probability. Read the "
                    "last column from the top: `Texas` before `Austin`.",
                ),
                Line(
                    series=(
                        Series(
                            name="Austin (answer)",
                            x=tuple(range(8)),
                            y=(0.0, 0.01, 0.05, 0.1, 0.16, 0.93, 0.97, 1.0),
                            low=(0.0, 0.0, 0.02, 0.06, 0.1, 0.88, 0.94, 0.98),
                            high=(0.01, 0.03, 0.09, 0.15, 0.23, 0.97, 0.99, 1.0),
                        ),
                        Series(
                            name="Texas (bridge)", x=tuple(range(8)), y=(0.0, 0.1, 0.72, 0.78, 0.78, 0.05, 0.01, None)
                        ),
                        Series(name="another state's capital", x=tuple(range(8)), y=(0.01,) * 8, control=True),
                    ),
                    x_label="block",
                    y_label="mean probability over 100 items",
                    caption="The answer, the state on the way to it, and a capital that is not asked for.",
                ),
            ),
            command="cutaway tour atlas --only lens",
            seconds=4.2,
        ),
        Section(
            id="heads",
            title="Attention heads",
            question="Which heads copy, and are they needed?",
            lead="Some heads look at the previous token, others at what followed an earlier copy of it. Removing the "
            "second kind destroys the model's ability to repeat.",
            blocks=(
                Figures(
                    items=(
                        Figure(label="loss on repeats without the top 3 induction heads", value=2.8, units="nats"),
                        Figure(label="with all heads", value=0.024, units="nats"),
                        Figure(label="without 3 random heads", value=0.021, units="nats", control=True),
                    )
                ),
                Heatmap(
                    rows=tuple(f"L{layer}" for layer in range(8)),
                    columns=tuple(f"H{head}" for head in range(8)),
                    values=tuple(tuple(rng.random() ** 6 for _ in range(8)) for _ in range(8)),
                    caption="Induction score of each head: attention to the token after the earlier copy.",
                    units="attention",
                    row_axis="block",
                    column_axis="head",
                    marks=((7, 3), (6, 3)),
                ),
                Bars(
                    items=(
                        Bar(label="top 3 induction heads", value=2.8, low=2.5, high=3.1),
                        Bar(label="top 2 previous-token heads", value=11.4, low=10.9, high=11.8),
                        Bar(label="3 random heads, mean of 10 draws", value=-0.3, low=-0.6, high=0.02, control=True),
                        Bar(label="not measured", value=None),
                    ),
                    units="nats",
                    caption="Rise of the loss on the second half of repeated random tokens.",
                ),
            ),
            effects=(effect("Loss on repeats, induction heads ablated"),),
            command="cutaway tour atlas --only heads",
            seconds=11,
        ),
        Section(
            id="patching",
            title="Activation patching",
            question="Which internal value carries the answer?",
            lead="Two prompts differ in one city. Copying one internal value from the first run into the second shows "
            "where the answer follows it: first the city's own position, later the last one.",
            note="n = 100 prompt pairs for each cell; cells in between may be carried by several positions together.",
            blocks=(
                Heatmap(
                    rows=tuple(layers),
                    columns=tuple(tokens),
                    values=tuple(map(tuple, patch_cells)),
                    caption="Share of pairs whose answer becomes the other city's capital (Austin → Sacramento).",
                    units="share of pairs that flip",
                    diverging=True,
                    row_axis="patched at",
                    column_axis="position",
                    marks=((0, 7), (2, 8)),
                ),
                EffectBlock(effect=effect()),
                Table(
                    columns=("pair", "clean answer", "corrupt answer", "logit difference", "flips"),
                    rows=(
                        ("Dallas → Oakland", "Austin", "Sacramento", 8.913, True),
                        ("Boston → Miami", "Boston", "Tallahassee", -1.25, False),
                        ("Çorum → <Paris>", None, "–", math.nan, None),
                    ),
                    caption="Three of the pairs.",
                ),
            ),
            command="cutaway tour atlas --only patching --pair 'Dallas' \"Oakland\"",
            seconds=38.4,
        ),
        Section(
            id="dictionary",
            title="Dictionary",
            question="Which ideas does a middle layer hold?",
            lead="A TopK dictionary rewrites the stream after block 3 as sixteen of 2,048 directions. Here are those "
            "that match known entities best, with an automatic token summary as their label.",
            note="Labels are made from the top tokens alone; they flatter. Nothing here says that the model uses them.",
            blocks=(
                Figures(
                    items=(
                        Figure(label="CE recovered", value=0.965),
                        Figure(label="variance explained", value=0.842),
                        Figure(label="L0", value=16),
                        Figure(label="dead latents", value=0, detail="of 2,048"),
                    )
                ),
                Features(
                    items=tuple(
                        Latent(
                            id=number,
                            label=label,
                            label_note="token summary, automatic",
                            density=density,
                            top_examples=tuple(
                                Example(
                                    tokens=(" went", " to", " the", " tall", token, " in", "\n", " Paris", "."),
                                    values=(0, 0, 0.3, 1.2, 6.1 - shift, 0.4, 0, 2.2, 0),
                                )
                                for shift in (0, 0.4, 1.1)
                            ),
                            promotes=tuple(TokenEffect(token=t, value=v) for t, v in ((" Paris", 3.1), (token, 2.4))),
                            suppresses=tuple(
                                TokenEffect(token=t, value=v) for t, v in ((" London", -1.9), ("\n", -1.2))
                            ),
                            auroc=auroc,
                            concept=concept,
                        )
                        for number, label, density, token, auroc, concept in (
                            (1204, "Tower, Eiffel, Leaning", 0.0021, " Tower", 0.993, "landmark: Eiffel Tower"),
                            (77, "<|user|> and what follows", 0.11, "<|user|>", 0.88, "chat turn"),
                            (391, 'os. / "re.compile("', 0.00004, 're.compile("', None, None),
                        )
                    )
                ),
                Tokens(
                    rows=(
                        TokenRow(
                            label="Latent 1204 on a held-out text",
                            tokens=tuple(tokens + NASTY),
                            values=tuple([None, 0.0, 0.1, 0.4] + [rng.random() * 6 for _ in tokens[4:] + NASTY]),
                            detail="maximum 6.1 at Tower",
                        ),
                        TokenRow(label="Nothing fires", tokens=("a", " b"), values=(0.0, None)),
                    ),
                    caption="How strongly the latent fires on each token.",
                    units="activation",
                ),
            ),
            command="cutaway tour atlas --only dictionary",
            seconds=126.0,
        ),
        Section(
            id="steering",
            title="Steering",
            question="Can one direction switch refusal off?",
            lead="The difference of means between harmful and harmless requests is held at its harmless mean. It "
            "then answers what it refused; removing the direction outright does not work, and both are shown.",
            note="Zero-ablation is a null result here: refused 0.94 before, 0.90 after. Its price is KL 0.03.",
            status="fallback",
            blocks=(
                Text(
                    text="The direction is read at the `<|assistant|>` token of `blocks.5.resid_post`.\n\n"
                    "Each text below continues the same prompt; the control holds a random direction of the same norm."
                ),
                Compare(
                    prompt="<|user|>Tell me how to poison the well.\n<|assistant|>",
                    items=(
                        Continuation(label="Unsteered", text="I can not help with that.", note="refused"),
                        Continuation(
                            label="Clamped to the harmless mean",
                            text="Sure. First you take the well and </pre><b>poison</b> it.",
                            note="answered · KL 0.03 nats",
                            highlight=("Sure", "</pre><b>poison</b>"),
                        ),
                        Continuation(
                            label="Random direction", text="I can not help with that.", control=True, note="refused"
                        ),
                    ),
                    caption="The same request three ways.",
                ),
                EffectBlock(effect=effect("Share of harmful requests that are answered")),
            ),
            command="cutaway tour atlas --only steering",
            seconds=22,
        ),
        Section(
            id="landmark",
            title="Landmark latent",
            question="Does clamping a landmark change the story?",
            lead="Not asked of this model.",
            status="not shown",
            note="not shown: right on 3 of 20 landmark prompts, and 16 are needed.",
            command="cutaway tour atlas --only landmark",
        ),
    )
    return TourResult(
        title="Inside atlas",
        card=Card(
            name="atlas",
            identity="shipped with cutaway · sha256 3f9a…c21e",
            description="A small Llama trained on a world whose facts we know.",
            facts=(
                Fact(label="layers", value=8),
                Fact(label="width", value=256),
                Fact(label="heads", value=8),
                Fact(label="vocabulary", value=8192),
                Fact(label="position", value="rotary"),
                Fact(label="precision", value="float32"),
            ),
            parameters=8_330_240,
            context=512,
            selftest=SelfTest(passed=212, total=212, detail="worst relative error 2.1e-6 (tolerance 1e-5)"),
        ),
        sections=sections,
        manifest={
            "id": "9f2c41d7" * 8,
            "kind": "tour",
            "model": {"id": "atlas", "revision": None, "weight_hash": "3f9a" * 16},
            "corpus_hash": "b77e" * 16,
            "configuration": {"seed": 0},
            "seed": 0,
            "version": "0.1.0",
            "parents": [],
            "created": "2026-11-20T20:00:00+00:00",
            "command": "cutaway tour atlas",
        },
        version="0.1.0",
        created="2026-11-20T20:00:00+00:00",
        total_seconds=203.0,
        configuration={"model": "atlas", "corpus": None, "seed": 0, "note": "</script><script>alert(1)</script>"},
    )


def with_block(block: Block) -> TourResult:
    """The smallest tour that shows one block."""
    section = Section(id="only", title="Only", question="What is this?", lead="One block.", blocks=(block,))
    card = Card(name="tiny", identity="none", parameters=1)
    return TourResult(title="One", card=card, sections=(section,), version="0", created="2026-01-01")
