"""An edited run equals the same change written as a hook by hand, and its receipt says what was touched."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import by_hand_edits as by_hand
import numpy as np
import pytest
import torch
from one_latent import one_latent
from subject import Subject, Subjects, close
from tiny import HEADS, random_rows, tiny_model
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import Edit, NothingEdited
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens

COLUMNS = {"right": (0, 0, 0), "left": (0, 4, 7)}  # of each row's first real token
LENGTHS = (11, 7, 4)


def vector(n: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def is_grid(site: str) -> bool:
    return site.endswith((".scores", ".pattern"))


def check(
    subject: Subject,
    tokens: Tokens,
    edits: Edit | list[Edit],
    changes: dict[str, Callable[[Tensor], Tensor]],
    moves: bool = True,
    tolerance: float = 2e-5,
) -> None:
    """The edited run's logits, and the values it captures at the edited sites, equal those of the hand-written hooks.

    And the edit `moves` the logits at all: without that, nothing would be compared.
    """
    sites = list(changes)
    run = subject.lm.run(tokens, edits=edits, capture=sites)
    after: dict[str, Tensor] = {}

    def watched(site: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            after[site] = changes[site](x)
            return after[site]

        return change

    expected = subject.by_hand.logits(tokens.ids, tokens.mask, {site: watched(site) for site in sites})
    real = tokens.mask
    assert run.logits is not None
    difference = (expected - subject.by_hand.untouched(tokens.ids, tokens.mask))[real]
    assert (float(difference.abs().max()) > 1e-3) == moves
    close(run.logits[real], expected[real], tolerance)
    for site in sites:
        ours, theirs = run[site], after[site].expand_as(run[site])
        if is_grid(site):
            ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
        close(ours[real], theirs[real], tolerance)


def editable(lm: LanguageModel) -> list[str]:
    """Every site of layer 1 and those outside the layers."""
    return [name for name in lm.sites().present() if not name.startswith("blocks.") or name.startswith("blocks.1.")]


def for_each_row(change: Callable[[Tensor], Tensor], n: int) -> Callable[[Tensor], Tensor]:
    return lambda x: change(x.expand(n, -1, -1))


def scaled_and_moved(
    lm: LanguageModel, tokens: Tokens, site: str, where: dict[str, Any]
) -> tuple[Edit | list[Edit], by_hand.Value]:
    """An edit that no norm and no softmax undoes, and what it means: 0.4 x + d, or d at scores and pattern."""
    if is_grid(site):
        d = vector(11) * tokens.mask.all(0)  # what stands at padding is nobody's business
        return cutaway.set(site, d, **where), lambda x, row, column: d.where(x > -torch.inf, x)
    d = vector(int(lm.sites()[site].shape[-1]))
    return [cutaway.scale(site, 0.4, **where), cutaway.add(site, d, **where)], lambda x, row, column: x * 0.4 + d


def test_an_edit_at_every_site_equals_a_hand_written_hook(subject: Subject) -> None:
    """Two cells of row 0 and one of row 2 are scaled, at each site in turn, the padding now right, now left."""
    for i, site in enumerate(editable(subject.lm)):
        side = ("left", "right")[i % 2]
        tokens, first = subject.tokens(side), COLUMNS[side]
        cells = [(0, first[0] + 2), (0, first[0] + 10), (2, first[2] + 3)]
        where = {"positions": [[2, -1], [3]], "rows": [0, 2]}
        edit, value = scaled_and_moved(subject.lm, tokens, site, where)
        change = by_hand.in_cells(cells, value, grid=is_grid(site))
        if site == "pos_embed":  # one row of positions serves the whole batch until an edit tells rows apart
            change = for_each_row(change, len(tokens))
        check(subject, tokens, edit, {site: change})


def test_an_edit_of_heads_touches_these_heads_alone(subject: Subject) -> None:
    tokens, lm = subject.tokens("left"), subject.lm
    first = COLUMNS["left"]
    cells = [(row, first[row] + i) for row in (0, 1) for i in (1, 3)]
    for part in ("q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "result"):
        site = f"blocks.1.attn.{part}"
        n = lm.n_kv_heads if part in ("k", "v", "rot_k") else HEADS
        heads = [0, n - 1] if n > 2 else [1]
        grid = is_grid(site)
        edit, value = scaled_and_moved(lm, tokens, site, {"positions": [1, 3], "rows": [0, 1], "heads": heads})
        change = by_hand.in_cells(cells, value, heads=heads, grid=grid)
        check(subject, tokens, edit, {site: change})
        clean, edited = lm.run(tokens, capture=site)[site], lm.run(tokens, edits=edit, capture=site)[site]
        others = [h for h in range(n) if h not in heads]
        at = (slice(None), others) if grid else (slice(None), slice(None), others)
        assert torch.equal(clean[at], edited[at])


KINDS = ["set", "zero", "mean", "patch", "add", "scale", "project_out", "clamp", "clamp between", "clamp_latent"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "part", ["resid_pre", "resid_mid", "resid_post", "attn.out", "attn.result", "attn.z", "mlp.post", "mlp.out"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_every_kind_of_edit_equals_its_formula(of_family: Subjects, family: str, part: str, kind: str) -> None:
    subject = of_family(family)
    site = f"blocks.1.{part}"
    if (family, part) == ("neox", "resid_mid"):
        with pytest.raises(CutawayError, match="parallel residual"):
            subject.lm.run([5, 6], edits=cutaway.zero(site))
        return
    tokens, first = subject.tokens("left"), COLUMNS["left"]
    heads = [2] if part in ("attn.result", "attn.z") else None
    width = int(subject.lm.sites()[site].shape[-1])
    cells = [(row, first[row] + i) for row in range(3) for i in (1, LENGTHS[row] - 1)]
    d = vector(width)
    where = {"positions": [1, -1], "heads": heads}
    value: by_hand.Value
    if kind == "set":
        edit, value = cutaway.set(site, d, **where), lambda x, row, column: d
    elif kind == "zero":
        edit, value = cutaway.zero(site, **where), lambda x, row, column: x * 0
    elif kind == "mean":
        edit, value = cutaway.mean(site, 0.3 * d, **where), lambda x, row, column: 0.3 * d
    elif kind == "patch":
        other = subject.tokens("left", random_rows(LENGTHS, seed=5))
        source = subject.lm.run(other, capture=site)
        seen = subject.by_hand.values(other.ids, other.mask, [site])[site]
        edit = cutaway.patch(site, source, **where)
        value = lambda x, row, column: seen[row, column] if heads is None else seen[row, column, heads[0]]  # noqa: E731

    elif kind == "add":
        edit, value = cutaway.add(site, d, -2.0, **where), lambda x, row, column: x - 2.0 * d
    elif kind == "scale":
        edit, value = cutaway.scale(site, 3.0, **where), lambda x, row, column: x * 3.0
    elif kind == "project_out":
        edit, value = cutaway.project_out(site, d, **where), lambda x, row, column: by_hand.projected_out(x, d)
    elif kind == "clamp":
        edit, value = cutaway.clamp(site, d, 1.5, **where), lambda x, row, column: by_hand.clamped(x, d, 1.5, 1.5)
    elif kind == "clamp between":
        edit = cutaway.clamp(site, d, minimum=-0.1, maximum=0.05, **where)
        value = lambda x, row, column: by_hand.clamped(x, d, -0.1, 0.05)  # noqa: E731
    else:
        encoder, offset = vector(width, 2), vector(width, 3, 0.1)
        edit = cutaway.clamp_latent(one_latent(site, encoder, 0.2, d, offset), 0, 0.7, positions=[1, -1])
        edit = replace(edit, heads=None if heads is None else tuple(heads))
        value = lambda x, row, column: by_hand.latent_clamped(x, encoder, 0.2, d, 0.7, offset)  # noqa: E731
    undone = (family, part, kind) == ("gemma2", "mlp.post", "scale")  # by the norm that follows
    check(subject, tokens, edit, {site: by_hand.in_cells(cells, value, heads=heads)}, moves=not undone)


def test_edits_at_one_site_apply_in_order_and_at_several_sites_together(subject: Subject) -> None:
    tokens = subject.tokens("left")
    d, cells = vector(subject.lm.d_model), [(0, 1), (1, 5), (2, 8)]
    post, out = "blocks.0.resid_post", "blocks.2.attn.out"
    edits = [
        cutaway.add(post, d, positions=1),
        cutaway.zero(out, positions=1),
        cutaway.scale(post, 2.0, positions=1),
    ]
    changes = {
        post: by_hand.in_cells(cells, lambda x, row, column: (x + d) * 2),
        out: by_hand.in_cells(cells, lambda x, row, column: x * 0),
    }
    check(subject, tokens, edits, changes)


def test_the_middle_of_the_stream_is_not_the_norms_input(of_family: Subjects) -> None:
    """An edit of resid_mid goes into the stream: it must not be one of what the second norm alone reads."""
    subject = of_family("llama")
    tokens = subject.tokens()
    d = vector(subject.lm.d_model)
    run = subject.lm.run(tokens, edits=cutaway.add("blocks.1.resid_mid", d), capture="blocks.1.resid_post")
    clean = subject.lm.run(tokens, capture="blocks.1.resid_post")

    def norms_input(_m: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0] + d,)

    handle = subject.hf.get_submodule("model.layers.1.post_attention_layernorm").register_forward_pre_hook(norms_input)
    try:
        only_norm = subject.lm.run(tokens, capture="blocks.1.resid_post")
    finally:
        handle.remove()
    site = "blocks.1.resid_post"
    close(run[site][tokens.mask], (only_norm[site] + d)[tokens.mask])
    assert float((only_norm[site] - clean[site]).abs().max()) > 0


def test_values_broadcast_as_documented(llama: LanguageModel) -> None:
    rows = random_rows((6, 6))
    tokens = llama.tokens(rows)
    site, z = "blocks.1.resid_post", "blocks.1.attn.z"
    width = llama.d_model
    per_position = vector(2 * width).reshape(2, width)
    per_cell = vector(4 * width).reshape(2, 2, width)
    whole = vector(12 * width).reshape(2, 6, width)
    clean = llama.run(tokens, capture=[site, z])

    def after(edit: Edit) -> Tensor:
        return llama.run(tokens, edits=edit, capture=edit.site)[edit.site]

    assert torch.equal(after(cutaway.set(site, 2.0)), torch.full_like(clean[site], 2.0))
    assert torch.equal(
        after(cutaway.set(site, per_position, positions=[4, 1]))[:, [4, 1]], per_position.expand(2, 2, -1)
    )
    assert torch.equal(after(cutaway.set(site, per_cell, positions=[4, 1]))[:, [4, 1]], per_cell)
    assert torch.equal(after(cutaway.set(site, whole)), whole)
    assert torch.equal(after(cutaway.patch(site, whole)), whole)
    one = after(cutaway.set(z, vector(llama.d_head), heads=[1, 3]))
    assert torch.equal(one[:, :, [1, 3]], vector(llama.d_head).expand(2, 6, 2, -1))
    assert torch.equal(one[:, :, [0, 2]], clean[z][:, :, [0, 2]])
    each = vector(2 * llama.d_head).reshape(2, -1)
    assert torch.equal(after(cutaway.set(z, each, heads=[1, 3]))[:, :, [1, 3]], each.expand(2, 6, 2, -1))
    pattern = "blocks.1.attn.pattern"
    even = torch.full((6,), 1 / 6)
    assert torch.equal(after(cutaway.set(pattern, even, heads=2))[:, 2], even.expand(2, 6, 6))


def test_positions_count_real_tokens_whatever_the_padding(subject: Subject) -> None:
    site = "blocks.1.resid_post"
    edit = cutaway.add(site, vector(subject.lm.d_model), positions=[0, -2])
    right, left = subject.tokens("right"), subject.tokens("left")
    runs = [subject.lm.run(tokens, edits=edit, capture=site) for tokens in (right, left)]
    for row, ids in enumerate(subject.rows):
        alone = subject.lm.run(ids, edits=edit)
        assert alone.logits is not None
        for run, tokens in zip(runs, (right, left), strict=True):
            assert run.logits is not None
            close(run.logits[row][tokens.mask[row]], alone.logits[0], 2e-5)
    for run in runs:
        (receipt,) = run.receipts
        assert receipt.positions == ((0, 9), (0, 5), (0, 2))


# Patching


def test_patching_matches_positions_and_rows(of_family: Subjects) -> None:
    """From a left-padded run of other lengths into a right-padded one; rows and positions in any order."""
    subject = of_family("gpt2")
    lm, site = subject.lm, "blocks.1.resid_post"
    source = lm.run(subject.tokens("left", random_rows((5, 9), seed=3)), capture=site)
    tokens = subject.tokens("right")
    first = {0: 4, 1: 0}  # of the source's rows
    edit = cutaway.patch(
        site, source, rows=[2, 0], positions=[[3, 1], [0, -1]], source_rows=[1, 0], source_positions=[[8, 2], [4, 0]]
    )
    from_cell = {
        (2, 3): (1, first[1] + 8),
        (2, 1): (1, first[1] + 2),
        (0, 0): (0, first[0] + 4),
        (0, 10): (0, first[0] + 0),
    }
    run = lm.run(tokens, edits=edit, capture=site)
    clean = lm.run(tokens, capture=site)
    for row in range(3):
        for column in range(11):
            if (row, column) in from_cell:
                assert torch.equal(run[site][row, column], source[site][from_cell[row, column]])
            else:
                assert torch.equal(run[site][row, column], clean[site][row, column])


def test_patching_every_token_needs_equal_lengths(llama: LanguageModel) -> None:
    site = "blocks.1.resid_post"
    source = llama.run(random_rows((5,), seed=3), capture=site)
    same = llama.run(random_rows((5, 5)), edits=cutaway.patch(site, source), capture=site)
    assert torch.equal(same[site], source[site].expand(2, -1, -1))
    with pytest.raises(CutawayError, match=r"6 tokens.* 5"):
        llama.run(random_rows((6,)), edits=cutaway.patch(site, source))


def test_patching_with_its_own_values_changes_nothing(subject: Subject) -> None:
    tokens = subject.tokens("left")
    sites = [s for s in editable(subject.lm) if s != "pos_embed"]
    run = subject.lm.run(tokens, capture=sites)
    again = subject.lm.run(tokens, edits=[cutaway.patch(s, run) for s in sites], capture=sites)
    assert run.logits is not None
    assert again.logits is not None
    close(again.logits[tokens.mask], run.logits[tokens.mask])
    assert all(r.mean_abs_delta <= 1e-5 * max(r.mean_abs_before, 1e-3) for r in again.receipts)
    assert len(again.receipts) == len(sites)


# Receipts


def test_a_receipt_says_what_was_changed(subject: Subject) -> None:
    tokens = subject.tokens("left")
    site = "blocks.1.attn.z"
    clean = subject.lm.run(tokens, capture=site)[site]
    edit = cutaway.scale(site, 3.0, positions=[1, 3], rows=[0, 2], heads=[1, 2])
    run = subject.lm.run(tokens, edits=[cutaway.scale("blocks.0.resid_pre", 1.0), edit])
    other, receipt = run.receipts
    cells = [(0, 1), (0, 3), (2, 8), (2, 10)]
    before = torch.stack([clean[r, c, [1, 2]] for r, c in cells]).double()
    assert (receipt.edit, receipt.kind, receipt.site, receipt.layer) == (1, "scale", site, 1)
    assert (receipt.rows, receipt.positions, receipt.heads) == ((0, 2), ((1, 3), (1, 3)), (1, 2))
    assert receipt.n_tokens == 4
    assert receipt.mean_abs_before == pytest.approx(before.abs().mean().item(), rel=1e-5)
    assert receipt.mean_abs_after == pytest.approx(3 * before.abs().mean().item(), rel=1e-5)
    assert receipt.mean_abs_delta == pytest.approx(2 * before.abs().mean().item(), rel=1e-5)
    assert (other.mean_abs_delta, other.n_tokens) == (0.0, 22)
    assert "4 tokens in 2 rows, heads [1, 2]" in str(receipt)


def test_a_wildcard_has_one_receipt_a_site(llama: LanguageModel) -> None:
    run = llama.run([5, 6, 7], edits=cutaway.zero("blocks.{1..2}.mlp.out", positions=1))
    assert [(r.edit, r.layer, r.site, r.positions) for r in run.receipts] == [
        (0, 1, "blocks.1.mlp.out", ((1,),)),
        (0, 2, "blocks.2.mlp.out", ((1,),)),
    ]


def test_scores_receipts_count_only_cells_that_are_seen(llama: LanguageModel) -> None:
    run = llama.run([5, 6, 7], edits=cutaway.add("blocks.1.attn.scores", torch.tensor(2.0), heads=1))
    assert run.receipts[0].mean_abs_delta == pytest.approx(2.0)


# What is refused

SITE = "blocks.1.resid_post"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cutaway.zero(SITE, positions=[]), "touch nothing"),
        (lambda: cutaway.zero(SITE, rows=[]), "touch nothing"),
        (lambda: cutaway.zero("blocks.1.attn.z", heads=[]), "touch nothing"),
        (lambda: cutaway.zero(SITE, phase="new"), "touches no token"),
        (lambda: cutaway.zero(SITE, phase=(0, 3)), "touches no token"),
        (lambda: cutaway.zero(SITE, phase="later"), "phase='later'"),  # type: ignore[arg-type]
        (lambda: cutaway.zero(SITE, phase=(3, 3)), "phase"),
        (lambda: cutaway.zero(SITE, positions=11), "Position 11 is outside row 0, which has 11 tokens"),
        (lambda: cutaway.zero(SITE, positions=-5), "row 2, which has 4"),
        (lambda: cutaway.zero(SITE, positions=[0, 0]), "twice"),
        (lambda: cutaway.zero(SITE, positions=[0, -11], rows=0), "twice"),
        (lambda: cutaway.zero(SITE, positions=[[0], [1]]), "2 lists for 3 rows"),
        (lambda: cutaway.zero(SITE, positions=[0, [1], [2]]), "not both"),  # type: ignore[arg-type]
        (lambda: cutaway.zero(SITE, rows=3), r"row 3.*3 rows"),
        (lambda: cutaway.zero(SITE, rows=-1), "row -1"),
        (lambda: cutaway.zero(SITE, heads=0), "has none"),
        (lambda: cutaway.zero("blocks.1.attn.z", heads=4), r"head 4.*4 heads"),
        (lambda: cutaway.zero("blocks.1.attn.v", heads=2), r"head 2.*2 key-value heads"),
        (lambda: cutaway.zero("blocks.3.resid_post"), r"layer 3.*0 to 2"),
        (lambda: cutaway.zero("blocks.1.resid_pots"), "did you mean"),
        (lambda: cutaway.add(SITE, torch.ones(31)), "31 entries.*32 wide"),
        (lambda: cutaway.project_out(SITE, torch.ones(31)), "31 entries"),
        (lambda: cutaway.project_out(SITE, torch.ones(1)), "1 entries"),
        (lambda: cutaway.project_out(SITE, torch.zeros(32)), "zero vector"),
        (lambda: cutaway.clamp(SITE, torch.ones(2, 32), 1.0), "one vector"),
        (lambda: cutaway.clamp(SITE, torch.ones(32)), "minimum"),
        (lambda: cutaway.clamp(SITE, torch.ones(32), 1.0, minimum=0.0), "minimum"),
        (lambda: cutaway.clamp(SITE, torch.ones(32), minimum=2.0, maximum=1.0), "above its maximum"),
        (lambda: cutaway.set(SITE, torch.tensor(float("nan"))), "NaN"),
        (lambda: cutaway.add(SITE, torch.full((32,), float("inf"))), "NaN or infinity"),
        (lambda: cutaway.set(SITE, torch.ones(31)), r"shape \(31,\)"),
        (lambda: cutaway.set(SITE, torch.ones(5, 32)), r"shape \(5, 32\)"),
        (lambda: cutaway.add(SITE, torch.ones(5, 32)), r"shape \(5, 32\)"),
        (lambda: cutaway.set("blocks.1.attn.z", torch.ones(4, 8), heads=[1, 2]), r"shape \(4, 8\)"),
        (lambda: cutaway.set(SITE, torch.ones(1, 3, 11, 32)), r"shape \(1, 3, 11, 32\)"),
        (lambda: cutaway.patch(SITE, torch.ones(32)), r"shape"),
        (lambda: cutaway.patch(SITE, torch.ones(3, 11, 1)), r"shape"),
        (lambda: cutaway.patch(SITE, torch.ones(3, 11, 31)), r"shape"),
        (lambda: cutaway.patch(SITE, torch.ones(3, 5, 32)), "no position"),
        (lambda: cutaway.patch(SITE, torch.ones(2, 11, 32)), "2 rows"),
        (lambda: cutaway.patch(SITE, torch.ones(3, 11, 32), source_rows=[0, 1]), "2 source rows for 3 rows"),
        (lambda: cutaway.patch(SITE, torch.ones(3, 11, 32), source_positions=[0]), "needs positions"),
        (lambda: cutaway.patch(SITE, torch.ones(3, 11, 32), positions=0, source_positions=[0, 1]), "source positions"),
        (lambda: cutaway.clamp_latent(one_latent(SITE, torch.ones(31), 0.0, torch.ones(31)), 0, 1.0), "31"),
        (lambda: cutaway.zero(SITE, rows=[1, 1]), "twice"),
        (lambda: cutaway.zero("blocks.1.attn.z", heads=[1, 1]), "twice"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused_in_one_sentence(
    of_family, make: Callable[[], Edit], words: str
) -> None:
    subject = of_family("llama")
    with pytest.raises(CutawayError, match=words) as raised:
        subject.lm.run(subject.tokens(), edits=make())
    assert "\n" not in str(raised.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.hf.modules())


def test_an_edit_after_the_last_captured_site_is_an_error(llama: LanguageModel) -> None:
    """The run stops before it, so it would do nothing."""
    with pytest.raises(NothingEdited, match="ended before it"):
        llama.run([5, 6], capture="blocks.0.resid_post", edits=cutaway.zero("blocks.1.mlp.out"), logits=None)


def test_a_source_that_lacks_the_site_is_an_error(llama: LanguageModel) -> None:
    source = llama.run([5, 6], capture="blocks.0.resid_post")
    with pytest.raises(CutawayError, match=r"did not capture 'blocks.1.resid_post'"):
        llama.run([5, 6], edits=cutaway.patch("blocks.1.resid_post", source))
    last = llama.run([5, 6], capture="logits", logits="last")
    assert last["logits"].shape[1] == 2


def test_an_edit_is_a_value_that_can_be_printed(llama: LanguageModel) -> None:
    edit = cutaway.clamp(SITE, torch.ones(32), minimum=-1, maximum=2, positions=[0, -1], rows=1, phase="prompt")
    assert str(edit) == "clamp blocks.1.resid_post minimum=-1 maximum=2 (positions [0, -1], rows [1], phase prompt)"
    direction = torch.ones(32)
    kept = cutaway.add(SITE, direction, 2.0)
    run = llama.run([5, 6], edits=kept)
    again = llama.run([5, 6], edits=kept)
    assert run.logits is not None
    assert again.logits is not None
    assert torch.equal(run.logits, again.logits)
    assert torch.equal(direction, torch.ones(32))
    assert len({e.site for e in run.edits}) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: cutaway.scale("blocks.0.resid_post", float("nan")), "factor is nan"),
        (lambda: cutaway.add("blocks.0.resid_post", torch.ones(4), float("inf")), "scale is inf"),
        (lambda: cutaway.clamp("blocks.0.resid_post", torch.ones(4), float("nan")), "is nan"),
        (lambda: cutaway.set("blocks.0.resid_post", "much"), "tensor of numbers"),  # type: ignore[arg-type]
        (lambda: cutaway.zero("blocks.0.resid_post", positions=1.5), "whole numbers"),  # type: ignore[arg-type]
        (lambda: cutaway.zero("blocks.0.resid_post", positions="last"), "whole numbers"),  # type: ignore[arg-type]
        (lambda: cutaway.zero("blocks.0.attn.z", heads=[0.5]), "whole numbers"),  # type: ignore[list-item]
        (lambda: cutaway.zero(3), "is a name"),  # type: ignore[arg-type]
        (lambda: cutaway.patch("blocks.0.resid_post", None), "a run or a tensor"),  # type: ignore[arg-type]
        (lambda: cutaway.zero("blocks.0.resid_post", phase=(0.5, 2)), "phase="),  # type: ignore[arg-type]
    ],
)
def test_values_that_are_no_edit_are_refused_when_it_is_made(make: Callable[[], object], says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        make()


def test_numpys_and_tensors_numbers_are_numbers() -> None:
    site = "blocks.0.attn.z"
    plain = cutaway.zero(site, positions=[1, 2], heads=[0], rows=1)
    kinds: list[tuple[Any, Any]] = [(np.int64, np.array), (torch.tensor, torch.tensor)]
    for one, several in kinds:
        assert str(cutaway.zero(site, positions=several([1, 2]), heads=several([0]), rows=one(1))) == str(plain)
        assert cutaway.zero(site, positions=one(3)).positions == 3
        assert cutaway.zero(site, positions=[several([1]), [2, 3]]).positions == ((1,), (2, 3))


@pytest.mark.parametrize("edits", ["zero", [None], 3])
def test_a_run_takes_nothing_else_for_edits(edits: object) -> None:
    lm = attach(tiny_model("llama"))
    with pytest.raises(CutawayError, match="is none"):
        lm.run([[1, 2, 3]], edits=edits)  # type: ignore[arg-type]
