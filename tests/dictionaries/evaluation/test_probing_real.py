"""Probing a dictionary of a real model: number agreement, and the sentiment of film reviews."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import cutaway
from cutaway.data.corpus.corpus import read_corpus, token_rows
from cutaway.dictionaries.evaluation.probing import DENSE_PROBE, NO_ACTIVATION, RANDOM, sparse_probing
from cutaway.dictionaries.ports import read_texts
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.from_model import train_on_model
from cutaway.dictionaries.training.rules import TopKRule

SITE = "blocks.1.resid_post"


@pytest.mark.slow
def test_number_and_sentiment(shared: Path) -> None:
    """A noun's number, read at nouns that the probe has not seen, is told by few latents; sentiment hardly, by any."""
    lm = cutaway.load(shared / "models" / "webtext-gpt2")
    rows = token_rows(lm, read_corpus(shared / "corpora" / "text" / "webtext_open.txt").documents, 128, limit=300)
    config = TrainConfig(d_sae=1024, selector=TopKRule(32), tokens=100_000, low_precision=True, dead_after=30_000)
    dictionary = train_on_model(lm, rows, SITE, config).dictionary

    lines = (shared / "corpora" / "agreement" / "nounpp_test.json").read_text().splitlines()
    prompts = {one["clean_prefix"]: one["case"].split("_")[0] for one in map(json.loads, lines)}
    texts = sorted(prompts)[:300]
    number = sparse_probing(
        dictionary,
        read_texts(lm, dictionary, texts, at=[text.split()[1] for text in texts]),
        [prompts[text] for text in texts],
        groups=[text.split()[1].rstrip("s") for text in texts],  # no subject on both sides of a fold
        what="the number of a noun",
        folds=3,
    )
    with (shared / "corpora" / "text" / "sst2_dev.tsv").open() as file:
        reviews = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:400]
    labels = np.array([label for *_, label in reviews])
    sentiment = sparse_probing(
        dictionary, read_texts(lm, dictionary, [text for text, _ in reviews]), labels, what="sentiment", folds=3
    )
    for found in (number, sentiment):
        print(found)
    effect = number.effects[1]["accuracy"]
    beside = {control.name: control.value for control in effect.controls}
    assert beside[DENSE_PROBE] > 0.95
    assert effect.value > beside[NO_ACTIVATION["accuracy"]] + 0.2
    assert effect.value > beside[RANDOM] + 0.1
