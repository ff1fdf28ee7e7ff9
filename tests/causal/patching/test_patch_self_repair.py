"""Self-repair against head results and norms written out by hand, and on a model with a planted backup."""

import pytest
import torch
from hand_hooks import ByHand
from planted_gates import gate_pairs, planted_gate
from tiny import tiny_model
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.patching.self_repair import NORM, self_repair
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.language_model import LanguageModel, attach


def _pairs(lm: LanguageModel, n: int) -> AlignedPairs:
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for i in range(n):
        ids = torch.randint(3, 97, (6,), generator=generator).tolist()
        other = [ids[0], (ids[1] + 7) % 90 + 3, *ids[2:]]
        pairs.append(PromptPair((0, *ids), (0, *other), 3 + i, 30 + i))
    return aligned(lm, pairs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_direct_total_and_what_makes_up_are_as_written_out(family: str) -> None:
    model = tiny_model(family)
    lm, hand = attach(model, name=family), ByHand(family, model)
    pairs = _pairs(lm, 4)
    heads = [(0, 1), (1, 2)]
    found = self_repair(lm, pairs, heads=heads, draws=2)
    ids, mask, rows = pairs.clean.ids, pairs.clean.mask, torch.arange(4)
    final = model.get_submodule(hand.names.final)
    u = model.get_parameter("lm_head.weight") if family == "llama" else model.get_parameter("transformer.wte.weight")
    toward = (u[pairs.answer] - u[pairs.wrong]).double()
    top = f"blocks.{lm.n_layers - 1}.resid_post"
    watched = ["blocks.0.attn.result", "blocks.1.attn.result", "blocks.2.attn.result", "blocks.2.mlp.out", top]

    def divisor(x: Tensor) -> Tensor:
        x = x.double()
        x = x - x.mean(-1, keepdim=True) if family == "gpt2" else x
        return ((x**2).mean(-1, keepdim=True) + hand.eps) ** 0.5

    clean = hand.values(ids, mask, watched)
    frozen = divisor(clean[top][:, -1])

    def share(x: Tensor) -> Tensor:
        x = x.double()
        x = x - x.mean(-1, keepdim=True) if family == "gpt2" else x
        return (x / frozen * final.weight.double() * toward).sum(-1)  # type: ignore[operator]

    given = hand.values(pairs.corrupt.ids, mask, ["blocks.0.attn.z", "blocks.1.attn.z"])
    changes = {}
    for layer, head in heads:
        site = f"blocks.{layer}.attn.z"

        def change(x: Tensor, site: str = site, head: int = head) -> Tensor:
            x = x.clone()
            x[:, -1, head] = given[site][:, -1, head]
            return x

        changes[site] = change
    edited: dict[str, Tensor] = {}

    def keep(site: str):
        def read(x: Tensor) -> Tensor:
            edited[site] = x.detach().clone()
            return x

        return read

    # attn.result of an edited layer is what z makes of it, so z is changed first and result read after
    patched = hand.logits(ids, mask, changes | {site: keep(site) for site in watched})
    plain = hand.logits(ids, mask, {})

    def difference(logits: Tensor) -> Tensor:
        return (logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.wrong]).double()

    direct = sum(
        share(clean[f"blocks.{layer}.attn.result"][:, -1, head])
        - share(edited[f"blocks.{layer}.attn.result"][:, -1, head])
        for layer, head in heads
    )
    total = difference(plain) - difference(patched)
    torch.testing.assert_close(found.removed.direct, direct, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.removed.total, total, rtol=1e-3, atol=1e-3)
    mlp = share(edited["blocks.2.mlp.out"][:, -1]) - share(clean["blocks.2.mlp.out"][:, -1])
    torch.testing.assert_close(found.removed.change[:, found.parts.index("L2 MLP")], mlp, rtol=1e-3, atol=1e-3)
    bias = 0.0 if family == "llama" else (final.bias.double() * toward).sum(-1)  # type: ignore[operator]
    norm = difference(patched) - share(edited[top][:, -1]) - bias
    torch.testing.assert_close(found.removed.norm, norm, rtol=1e-3, atol=2e-3)
    own = [found.parts.index(f"L{layer}H{head}") for layer, head in heads]
    others = [i for i in range(len(found.parts)) if i not in own]
    made_up = found.removed.change[:, others].sum(1) + found.removed.norm
    torch.testing.assert_close(found.removed.repair, made_up, rtol=1e-4, atol=1e-3)  # it adds up
    assert found.n == 4
    assert all(len(one.heads) == 2 and not {*one.heads} & {*heads} for one in found.controls)


def test_a_planted_backup_makes_up_for_all_of_it() -> None:
    """Head 0 writes the whole answer, and without it the MLP does: 4 logits direct, none in all."""
    lm = planted_gate("backup")
    found = self_repair(lm, gate_pairs(8), draws=12)
    assert not any((0, 0) in control.heads for control in found.controls)
    assert found.removed.heads == ((0, 0),)  # found by itself, on half of the pairs
    assert found.chosen_on == 4
    direct, total, repair = found.effects()
    assert direct.value == pytest.approx(4.0, abs=0.01)
    assert total.value == pytest.approx(0.0, abs=0.01)
    assert repair.value == pytest.approx(4.0, abs=0.01)
    growth = found.made_up()
    assert growth[0].name == "growth of L0 MLP without L0H0"
    assert growth[0].value == pytest.approx(4.0, abs=0.01)
    assert not any("L0H0 without" in effect.name for effect in growth)
    for effect in (direct, total, repair, *growth):
        assert effect.require_controls().choices is not None
        assert effect.controls[0].value == pytest.approx(0.0, abs=0.01)
    data = found.to_json()
    assert data["effects"][2]["choices"]["direction"] == "noise"
    assert data["heads"] == [[0, 0]]
    assert "L0 MLP" in str(found)
    assert NORM not in found.parts


def test_bad_requests() -> None:
    lm = planted_gate("or")
    with pytest.raises(CutawayError, match="no head L0H7"):
        self_repair(lm, gate_pairs(8), heads=[(0, 7)])
    with pytest.raises(CutawayError, match="6 pairs are too few to choose heads"):
        self_repair(lm, gate_pairs(6))
    with pytest.raises(CutawayError, match="5 of 8 heads cannot be knocked out"):
        self_repair(lm, gate_pairs(8), k=5)
