"""Sentiment in a real model, beside what the words alone give away."""

from pathlib import Path

import pytest

import cutaway
from cutaway.observe.probes.data import probe_data
from cutaway.observe.probes.sweep import probe_sweep


@pytest.mark.slow
@pytest.mark.parametrize("position", ["last", "mean"])
def test_the_bag_of_tokens_is_no_worse_on_sentiment(shared: Path, position: str) -> None:
    """SST-2's sentences: a small GPT-2 trained on web text says little more than its words do, and we report it so."""
    lm = cutaway.load(shared / "models" / "webtext-gpt2")
    lines = (shared / "corpora" / "text" / "sst2_dev.tsv").read_text().splitlines()[::2]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    data = probe_data(lm, list(texts), list(labels), position=position)
    found = probe_sweep(lm, data, sites="blocks.3.resid_post", draws=2)
    controls = {c.name.split(" (")[0]: c.value for c in found.best.effect.controls}
    assert 0.55 < found.best.effect.value < 0.85
    assert controls["bag of tokens"] > found.best.effect.value - 0.05
    assert abs(controls["shuffled labels"] - 0.5) < 0.1
    assert controls["position and length"] < 0.6
