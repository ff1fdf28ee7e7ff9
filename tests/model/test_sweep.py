"""Sweeps against the slow obvious version: one plain run a cell, with every logit."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subject import Subject, close
from torch import Tensor

import cutaway
from cutaway.model.edits import Edit
from cutaway.model.language_model import LanguageModel
from cutaway.model.run import Run
from cutaway.model.tokens import Tokens

Metric = Callable[[Tensor, Tokens], Tensor]


def two_logits(logits: Tensor, _tokens: Tokens) -> Tensor:
    """[n, V] -> [n, 2]"""
    return torch.stack([logits[:, 5] - logits[:, 9], logits[:, 11]], dim=-1)


def one_run_a_cell(lm: LanguageModel, tokens: Tokens, cells: list[Any], metric: Metric, logits: str = "last") -> Tensor:
    found = []
    for cell in cells:
        run = lm.run(tokens, edits=cell)
        assert run.logits is not None
        rows = torch.arange(len(tokens))
        found.append(metric(run.logits[rows, tokens.last] if logits == "last" else run.logits, tokens))
    return torch.stack(found)


def head_cells(lm: LanguageModel, source: Run) -> list[Edit]:
    return [
        cutaway.patch(f"blocks.{layer}.attn.z", source, heads=head)
        for layer in range(lm.n_layers)
        for head in range(lm.n_heads)
    ]


def random_cells(lm: LanguageModel, tokens: Tokens, n: int, seed: int) -> list[list[Edit]]:
    """Edits of any kind, at any site of any layer, at any position, several a cell."""
    rng = random.Random(seed)
    shortest = int(tokens.lengths.min())
    table = lm.sites()
    cells: list[list[Edit]] = []
    for _ in range(n):
        cell = []
        for _ in range(rng.choice([1, 1, 2])):
            site = rng.choice(table.present())
            positions = rng.choice([None, rng.randrange(shortest), -1, [0, shortest - 1] if shortest > 1 else 0])
            rows = rng.choice([None, rng.randrange(len(tokens))])
            address: dict[str, Any] = {"positions": positions, "rows": rows}
            if table[site].kind.has_heads:
                address["heads"] = rng.choice([None, 0, 1])
            width = table[site].shape[-1]
            if isinstance(width, int) and width > 1 and address.get("heads") is None and rng.random() < 0.5:
                cell.append(cutaway.add(site, torch.linspace(-1, 1, width), 0.5, **address))
            else:
                cell.append(cutaway.scale(site, 0.5, **address))
        cells.append(cell)
    return cells


@pytest.mark.parametrize("side", ["right", "left"])
def test_any_edits_give_what_one_run_a_cell_gives(subject: Subject, side: str) -> None:
    lm = subject.lm
    for tokens, seed in ((subject.tokens(side), 0), (lm.tokens(subject.rows[0]), 1)):
        cells = random_cells(lm, tokens, 40, seed)
        found = lm.sweep(tokens, cells, two_logits)
        assert bool(found.done.all())
        close(found.values, one_run_a_cell(lm, tokens, cells, two_logits), 2e-5)
        assert not [note for note in found.notes if "control" in note], found.notes


def test_every_site_of_every_layer_alone(subject: Subject) -> None:
    """Each site decides where a forward may enter, so each is tried, at the first, a middle and the last token."""
    lm, tokens = subject.lm, subject.lm.tokens(subject.rows[0])
    cells = [cutaway.scale(site, 0.5, positions=position) for site in lm.sites().present() for position in (0, 4, -1)]
    found = lm.sweep(tokens, cells, two_logits)
    close(found.values, one_run_a_cell(lm, tokens, cells, two_logits), 2e-5)
    assert len(found.batches) < len(cells) / 2
