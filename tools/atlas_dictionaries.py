"""Make the dictionaries that ship with atlas again: text, activations, training, judgement, cards.

    python tools/atlas_dictionaries.py --work /tmp/atlas            # resumes where it was interrupted

Three SAEs of the residual stream, trained on one harvest. Weights are stored in float16 (the figures on the cards are
those of the stored weights). The harvest needs about 8 GB of disk; all of it about 40 minutes of two cores.
"""

import argparse
import shutil
from pathlib import Path

import torch

import cutaway
from cutaway.artifacts.command import recording
from cutaway.artifacts.files import plain, write_json
from cutaway.artifacts.manifest import file_hash
from cutaway.data.corpus.corpus import token_rows
from cutaway.data.harvesting.hardware import bfloat16_is_fast
from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.settings import Storage
from cutaway.dictionaries import load, save
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evaluate import Evaluation, evaluate
from cutaway.dictionaries.selectors import describe
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.jobs import Job, train_jobs
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.dictionaries.training.sources import StoreSource
from cutaway.subjects.atlas.text import world_text, write_text

TARGET = Path(__file__).resolve().parent.parent / "src" / "cutaway" / "subjects" / "atlas" / "dictionaries"
SITES = tuple(f"blocks.{layer}.resid_post" for layer in (1, 3, 5))
# read by other trainings of the same harvest
ALSO = ("blocks.3.mlp.in", "blocks.3.mlp.out")
CHARACTERS, TOKENS, PASSES = 60_000_000, 3_000_000, 3
JUDGED_ROWS, SPLICED_ROWS = 128, 64
COMMAND = "python tools/atlas_dictionaries.py"


def configuration() -> TrainConfig:
    """4,096 latents, 32 active on a token."""
    return TrainConfig(
        d_sae=4096,
        selector=TopKRule(32),
        tokens=PASSES * TOKENS,
        batch=1024,
        dead_after=500_000,
        low_precision=bfloat16_is_fast(),
    )


def card(dictionary: Dictionary, judged: Evaluation, weights: Path) -> dict[str, object]:
    """What somebody who meets the file should know."""
    return {
        "site": dictionary.site,
        "model": dict(dictionary.model),
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "selector": describe(dictionary.selector),
        "tokens": PASSES * TOKENS,
        "different_tokens": TOKENS,
        "text": f"cutaway subjects text atlas --characters {CHARACTERS} --seed 0",
        "judged_on": f"{judged.n_tokens:,} tokens in {judged.n_rows} rows of another stream of the world",
        "figures": {name: effect.to_json() for name, effect in judged.effects.items()},
        "dead": judged.dead,
        "dense": judged.dense,
        "cross_entropy": judged.ce,
        "weights_sha256": file_hash(weights),
        "command": COMMAND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for text, activations and checkpoints")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    lm = cutaway.load("atlas")
    corpus = options.work / "text.jsonl"
    if not corpus.exists():
        write_text(corpus, CHARACTERS, 0)
    if not (options.work / "store" / "manifest.json").exists():
        harvest(lm, corpus, [*SITES, *ALSO], out=options.work / "store", tokens=TOKENS, storage=Storage("bfloat16"))
    source = StoreSource(options.work / "store", SITES)
    jobs = {site: Job(configuration(), (site,)) for site in SITES}
    trained = train_jobs(source, jobs, folder=options.work / "training")
    # the world alone: the library's held-out source was kept from atlas's training, but not from this one
    rows = token_rows(lm, world_text(1_000_000, "text-1"), 256, limit=JUDGED_ROWS)
    for site, result in trained.items():
        folder = options.out / site
        (folder / "card.json").unlink(missing_ok=True)  # of the dictionary before: `save` replaces only what it writes
        save(result.dictionary.to(dtype=torch.float16), folder, overwrite=folder.exists())
        stored = load(folder, dtype=torch.float32)
        with recording(COMMAND):
            judged = evaluate(lm, stored, rows, spliced_rows=SPLICED_ROWS)
        print(site, judged, sep="\n", flush=True)
        write_json(folder / "card.json", plain(card(stored, judged, folder / "sae_weights.safetensors")))
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{size / 1e6:.1f} MB in {options.out}")
    shutil.rmtree(options.work / "training")


if __name__ == "__main__":
    main()
