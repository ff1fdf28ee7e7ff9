"""Sparse feature circuits of atlas with the dictionaries that ship with it: top latents, and faithfulness by size.

    python benchmarks/feature_circuits.py
    python benchmarks/feature_circuits.py --tasks "two-hop capitals" --pairs 64 --sizes 25 50 100 200 400 800

Nodes are scored on every second pair, position by position, and circuits of the strongest are measured on the others:
every latent outside is set to its mean at that position, errors kept in every run or set to their mean in every run.
Beside it random circuits of as many latents. Labels are token summaries made by a rule on 256 rows of atlas's world
(`features/summary.py`), with the share of held-out activations that they cover; entities are those that
docs/atlas-dictionaries.md found latents for. Prints Markdown.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import cutaway  # noqa: E402
from cutaway.artifacts.results import interval_text  # noqa: E402
from cutaway.causal.attribution.feature_circuits import strongest_nodes  # noqa: E402
from cutaway.causal.attribution.feature_evaluation import feature_faithfulness  # noqa: E402
from cutaway.causal.attribution.latents import latent_attribution  # noqa: E402
from cutaway.causal.attribution.scores import Node  # noqa: E402
from cutaway.causal.task_results import try_tasks  # noqa: E402
from cutaway.data.corpus.corpus import token_rows  # noqa: E402
from cutaway.data.pairs import AlignedPairs  # noqa: E402
from cutaway.data.tasks.tasks import TASKS  # noqa: E402
from cutaway.dictionaries import load  # noqa: E402
from cutaway.dictionaries.dictionary import Dictionary  # noqa: E402
from cutaway.features.examples import Windows, top_examples  # noqa: E402
from cutaway.features.summary import token_summary  # noqa: E402
from cutaway.model.language_model import LanguageModel  # noqa: E402
from cutaway.subjects.atlas.text import world_text  # noqa: E402
from cutaway.tour.world_tasks import WORLD_TASKS  # noqa: E402


def one_length(pairs: AlignedPairs) -> AlignedPairs:
    """The pairs of the commonest length."""
    lengths = pairs.clean.lengths.tolist()
    common = max(set(lengths), key=lengths.count)
    return pairs[[i for i, length in enumerate(lengths) if length == common]]


def known_entities() -> dict[tuple[str, int], str]:
    """The latent that tells each known entity best, by site, as the dictionaries' page has it."""
    found, site = dict[tuple[str, int], str](), ""
    for line in (ROOT / "docs" / "atlas-dictionaries.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("## "):
            site = line.removeprefix("## ")
        elif len(cells) == 9 and cells[2].isdigit():
            key = site, int(cells[2])
            found[key] = f"{found[key]}, {cells[1]}" if key in found else cells[1]
    return found


def labels_of(lm: LanguageModel, dictionaries: dict[str, Dictionary], nodes: list[Node]) -> dict[tuple[str, int], str]:
    """What the latents of some nodes respond to, by a rule."""
    rows = token_rows(lm, world_text(600_000, "text-2"), 256, limit=256)
    by_site: dict[str, set[int]] = defaultdict(set)
    for node in nodes:
        if node.latent is not None:
            by_site[node.site].add(node.latent)
    found = {}
    for site, latents in by_site.items():
        examples = top_examples(lm, dictionaries[site], rows, latents=sorted(latents), n=2, windows=Windows(lower=0))
        for latent, summary in token_summary(lm, rows, examples).items():
            covered = f" ({summary.precision:.0%})" if summary.precision == summary.precision else ""
            found[site, latent] = f"{summary.label}{covered}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["two-hop capitals", "agreement across a noun"])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 200, 400, 800])
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--known", type=int, default=200, help="how many nodes to look for known entities in")
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    lm = cutaway.load("atlas")
    shipped = [load(f"atlas/blocks.{layer}.resid_post") for layer in (1, 3, 5)]
    tasks = [task for task in (*TASKS, *WORLD_TASKS) if task.name in arguments.tasks]
    for tried in try_tasks(lm, tasks, n=arguments.pairs):
        if tried.pairs is None or not tried.able:
            print(f"{tried.task.name}: left out, {tried.reason}")
            continue
        pairs = one_length(tried.pairs)
        ours, held = pairs[range(0, len(pairs), 2)], pairs[range(1, len(pairs), 2)]
        scores = latent_attribution(lm, ours, shipped, positions="each")
        top = strongest_nodes(scores, max_nodes=arguments.top)
        labels = labels_of(lm, {d.site: d for d in shipped}, [one.node for one in top.nodes])
        print(f"\n{tried.task.name}: {scores.agreement}; {len(ours)} pairs, {len(held)} held out\n")
        print("| node | score | label |\n|---|---|---|")
        for one in top.with_labels(labels).nodes:
            ends = interval_text(one.interval, 2, signed=True)
            print(f"| {one.node} | {one.score:+.2f} {ends} | {one.label or '–'} |")
        ranked = strongest_nodes(scores, max_nodes=arguments.known).with_labels(known_entities()).nodes
        for rank, one in enumerate(ranked, 1):
            if one.label:
                print(f"\nnumber {rank} of {len(scores)}: {one.node}, {one.score:+.2f}: {one.label}")
        print("\n| nodes | errors kept | random | errors at their mean | random |\n|---|---|---|---|---|")
        for size in arguments.sizes:
            circuit, cells = strongest_nodes(scores, max_nodes=size), []
            for errors in ("keep", "remove"):
                found = feature_faithfulness(
                    lm, held, circuit, shipped, errors=errors, reference=ours, draws=arguments.draws
                )
                low, high = found.interval or (0.0, 0.0)
                cells += [f"{found.value:.2f} {interval_text((low, high), 2)}", f"{found.controls[0].value:.2f}"]
            print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
