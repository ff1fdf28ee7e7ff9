"""docs/atlas-dictionaries.md: the cards of the dictionaries that ship with atlas, and what their latents respond to.

    python tools/atlas_latents.py

Figures are read from the cards (`tools/atlas_dictionaries.py` measured them); latents are looked at on text of another
stream, those that tell a known entity best and some drawn at random from all that are active often enough.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from atlas_latent_steering import handles_of, measure, section

import cutaway
from cutaway.artifacts.files import read_json
from cutaway.artifacts.results import interval_text
from cutaway.data.corpus.corpus import token_rows
from cutaway.dictionaries import load
from cutaway.features.activations import latent_activations
from cutaway.features.concepts import match_concepts, mentions
from cutaway.features.effects import logit_effects
from cutaway.features.examples import Windows, top_examples
from cutaway.features.summary import token_summary
from cutaway.subjects.atlas.text import world_text
from cutaway.tour.world_tasks import world_concepts

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "src" / "cutaway" / "subjects" / "atlas" / "dictionaries"
PAGE = ROOT / "docs" / "atlas-dictionaries.md"
ROWS, LEAST, RANDOM, VALUES = 640, 12, 8, 160
FIGURES = {
    "l0": "L0",
    "variance_explained": "variance explained",
    "ce_recovered_zero": "CE recovered, zero",
    "ce_recovered_mean": "CE recovered, mean",
    "ce_increase": "CE increase (nats)",
    "kl_recovered_zero": "KL recovered, zero",
    "kl": "KL (nats)",
}
HEAD = """# atlas's dictionaries

API: [`cutaway.dictionaries`](reference/dictionaries.md).

Three sparse autoencoders of atlas's residual stream ship with the package, {megabytes:.1f} MB together:

```python
from cutaway.dictionaries import load

dictionary = load("atlas/blocks.3.resid_post")  # likewise blocks.1 and blocks.5
print(dictionary)
```

Each has {d_sae:,} latents, {selector}, and was trained on {tokens:,} tokens ({different:,} different ones) of a stream
of atlas's world that no training of atlas has seen, with held-out library source (`tools/atlas_dictionaries.py`).
Figures are on {judged}, with 95 % intervals; random
directions of the same L0 in brackets. Read KL before CE: the model's own loss on this text is {clean:.1f} nats per
token, and where that is high, a disturbance can lower CE.
"""
LATENTS = """
Below are known entities with the latent that tells each best, chosen on every second row and measured on the others
(the control makes the same search for shuffled labels), and latents drawn at random from those active on at least 100
tokens. A label is a rule's summary of the tokens, with the share of held-out activations that it covers; the strongest
token of an example is bold."""


def main() -> None:
    """Write the page."""
    lm = cutaway.load("atlas")
    cards = {folder.name: read_json(folder / "card.json") for folder in sorted(SHIPPED.iterdir()) if folder.is_dir()}
    first = next(iter(cards.values()))
    size = sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file())
    parts = [
        HEAD.format(
            clean=first["cross_entropy"]["clean"],
            megabytes=size / 1e6,
            d_sae=first["d_sae"],
            selector=first["selector"].replace("topk k=", "TopK with k = "),
            tokens=first["tokens"],
            different=first["different_tokens"],
            judged=first["judged_on"],
        ),
        _cards(cards),
        LATENTS,
    ]
    rows = token_rows(lm, world_text(1_500_000, "text-2"), 256, limit=ROWS)
    parts += [_latents(lm, site, rows) for site in cards]
    dictionaries = {site: load(SHIPPED / site, dtype=torch.float32) for site in cards}
    parts.append(section(measure(lm, {site: handles_of(lm, one, rows[:VALUES]) for site, one in dictionaries.items()})))
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    print(f"{PAGE.relative_to(ROOT)} written")


def _cards(cards: dict[str, Any]) -> str:
    lines = ["", "| | " + " | ".join(cards) + " |", "|---" * (len(cards) + 1) + "|"]
    for name, label in FIGURES.items():
        cells = []
        for one in cards.values():
            effect = one["figures"][name]
            low, high = effect["interval"]
            cells.append(f"{effect['value']:.3f} {interval_text((low, high))} ({effect['controls'][0]['value']:.3f})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for name in ("dead", "dense"):
        lines.append(f"| {name} latents | " + " | ".join(f"{one[name]:.2%}" for one in cards.values()) + " |")
    return "\n".join(lines)


def _latents(lm: cutaway.LanguageModel, site: str, rows: torch.Tensor) -> str:
    dictionary = load(SHIPPED / site, dtype=torch.float32)
    activations = list(latent_activations(lm, dictionary, rows))
    labelled = {concept: mentions(lm, rows, words) for concept, words in world_concepts().items()}
    labelled = {c: mask for c, mask in labelled.items() if min(int(mask[0::2].sum()), int(mask[1::2].sum())) >= LEAST}
    found = sorted(match_concepts(lm, dictionary, rows, labelled, activations=activations), key=lambda m: -m.auroc)
    lines = [
        f"\n## {site}\n",
        "| entity | latent | AUROC | shuffled | precision | recall | mentions |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {m.concept} | {m.latent} | {m.auroc:.3f} | {m.effect.controls[0].value:.3f} | {m.precision:.2f} | "
        f"{m.recall:.2f} | {m.n_positive} |"
        for m in found
    ]
    counts = torch.bincount(torch.cat([part.latent for part in activations]), minlength=dictionary.d_sae)
    able = (counts >= 100).nonzero()[:, 0]
    drawn = able[torch.randperm(len(able), generator=torch.Generator().manual_seed(0))][:RANDOM].tolist()
    examples = top_examples(lm, dictionary, rows, latents=drawn, n=2, windows=Windows(0, 8, 2), activations=activations)
    labels = token_summary(lm, rows, examples)
    effects = {effect.latent: effect for effect in logit_effects(lm, dictionary, drawn, k=4)}
    lines += [
        "\n| latent | density | label | strongest examples | raises |",
        "|---|---|---|---|---|",
    ]
    for latent in drawn:
        texts = [_example(example.tokens, example.values) for example in examples[latent].top]
        raised = " ".join(f"`{_plain(token)}`" for token, _ in itertools.islice(effects[latent].promotes, 4))
        label = labels[latent]
        known = f"{_plain(label.label)} ({label.precision:.0%})" if label.precision == label.precision else "–"
        lines.append(f"| {latent} | {float(examples.density[latent]):.4f} | {known} | {' · '.join(texts)} | {raised} |")
    return "\n".join(lines)


def _example(tokens: tuple[str, ...], values: tuple[float, ...]) -> str:
    best = max(range(len(tokens)), key=lambda i: values[i])
    return "".join(f" **{_plain(token).strip()}**" if i == best else _plain(token) for i, token in enumerate(tokens))


def _plain(text: str) -> str:
    return text.replace("|", "¦").replace("\n", "⏎").replace("`", "'").replace("<", "‹").replace("*", "∗")


if __name__ == "__main__":
    main()
