"""Random edits at random addresses against loops over single numbers; noise, resampling, functions and subspaces."""

import pytest
import torch
from by_hand_address import Case, expected
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from one_latent import one_latent
from subject import Subjects, close
from tiny import HEADS, LENGTHS, D, random_rows, tiny_model
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import NothingEdited
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens, pad_rows

SITE, Z = "blocks.1.resid_post", "blocks.1.attn.z"
_lm: list[LanguageModel] = []


def small() -> LanguageModel:
    if not _lm:
        _lm.append(attach(tiny_model("llama"), name="small"))
    return _lm[0]


def batch(lengths: tuple[int, ...] = LENGTHS, side: str = "left", seed: int = 0) -> Tokens:
    rows = random_rows(lengths, seed)
    ids, mask = pad_rows(rows, 1, side)
    return Tokens(ids, mask, tuple(tuple(f"<{i}>" for i in row) for row in rows))


def vector(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Tokens, str]:
    """An edit of any kind at any address, beside what it means."""
    lengths = tuple(draw(st.lists(st.integers(2, 7), min_size=1, max_size=3)))
    tokens = batch(lengths, draw(st.sampled_from(["left", "right"])), draw(st.integers(0, 99)))
    site = draw(st.sampled_from([SITE, Z, "blocks.0.mlp.post", "blocks.1.attn.v", "blocks.2.mlp.out"]))
    shape = small().sites()[site].shape
    width, n_heads = int(shape[-1]), int(shape[2]) if len(shape) == 4 else None
    n, shortest = len(lengths), min(lengths)

    rows = draw(st.none() | st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    touched = list(range(n)) if rows is None else rows
    where: dict = {} if rows is None else {"rows": rows}
    form = draw(st.sampled_from(["all", "one", "list", "each", "slice", "mask", "ids"]))
    if form == "all":
        by_row = {r: list(range(lengths[r])) for r in touched}
    elif form == "one":
        where["positions"] = draw(st.integers(-shortest, shortest - 1))
        by_row = {r: [where["positions"] % lengths[r]] for r in touched}
    elif form == "list":
        where["positions"] = draw(st.lists(st.integers(0, shortest - 1), min_size=1, unique=True))
        by_row = dict.fromkeys(touched, where["positions"])
    elif form == "each":
        by_row = {r: draw(st.lists(st.integers(0, lengths[r] - 1), min_size=1, unique=True)) for r in touched}
        where["positions"] = [by_row[r] for r in touched]
    elif form == "slice":
        where["positions"] = draw(st.slices(shortest).filter(lambda s: len(range(shortest)[s]) > 0))
        by_row = {r: list(range(lengths[r]))[where["positions"]] for r in touched}
    elif form == "mask":
        mask = torch.zeros_like(tokens.mask)
        by_row = {}
        for r in touched:
            by_row[r] = sorted(draw(st.lists(st.integers(0, lengths[r] - 1), min_size=1, unique=True)))
            mask[r, [int(tokens.first[r]) + p for p in by_row[r]]] = True
        where["positions"] = mask
    else:
        wanted = int(tokens.ids[touched[0], int(tokens.first[touched[0]])])
        where["positions"] = cutaway.at_token(wanted, "all", missing="skip")
        by_row = {r: [i for i, token in enumerate(tokens.row_ids(r)) if token == wanted] for r in touched}

    assume(any(by_row.values()))
    heads = None
    if n_heads is not None and draw(st.booleans()):
        heads = draw(st.lists(st.integers(0, n_heads - 1), min_size=1, unique=True))
        where["heads"] = heads
    neurons, basis = None, None
    part = draw(st.sampled_from(["whole", "neurons", "basis"]))
    if part == "neurons":
        neurons = draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=4, unique=True))
        where["neurons"] = neurons
    elif part == "basis":
        basis = vector(width * 2, draw(st.integers(0, 99))).reshape(2, width)

    d = vector(width, draw(st.integers(0, 99)))
    inside = d if neurons is None else d[neurons]  # a value is given for what is addressed
    kind = draw(st.sampled_from(["set", "zero", "mean", "add", "scale", "function", "patch", "resample", "entry"]))
    if kind in ("set", "mean"):
        make = cutaway.set if kind == "set" else cutaway.mean
        edit, value = make(site, inside, **where), lambda x, row, p, i: d
    elif kind == "zero":
        edit, value = cutaway.zero(site, **where), lambda x, row, p, i: x * 0
    elif kind == "add":
        edit, value = cutaway.add(site, inside, 1.5, **where), lambda x, row, p, i: x + 1.5 * d
    elif kind == "scale":
        edit, value = cutaway.scale(site, -2.0, **where), lambda x, row, p, i: -2.0 * x
    elif kind == "function":
        edit, value = cutaway.function(site, lambda x: x**2 - 1, **where), lambda x, row, p, i: x**2 - 1
    elif kind == "entry":  # one number a position
        n_entries = max(len(p) for p in by_row.values())
        entries = vector(n_entries, 5)
        shaped = entries.reshape(n_entries, *[1] * (len(shape) - 2))
        edit, value = cutaway.set(site, shaped, **where), lambda x, row, p, i: entries[i]
    else:
        source = torch.randn(n, max(lengths), *[int(s) for s in shape[2:]], generator=torch.Generator().manual_seed(1))
        if kind == "resample" and form in ("one", "list"):
            where.pop("positions")
            asked = list(dict.fromkeys(p % shortest for p in by_row[touched[0]]))
            by_row = dict.fromkeys(touched, asked)
            turned = dict(zip(asked, reversed(range(len(asked))), strict=True))
            edit = cutaway.resample(site, source, positions=turned, **where)
            value = lambda x, row, p, i: source[row, turned[p]]  # noqa: E731
        else:
            edit, value = cutaway.patch(site, source, **where), lambda x, row, p, i: source[row, p]
    return Case(edit.within(basis), lambda row: by_row.get(row, []), value, heads, neurons, basis), tokens, site


@settings(max_examples=150)
@given(cases())
def test_every_edit_is_what_loops_over_its_cells_make(drawn: tuple[Case, Tokens, str]) -> None:
    case, tokens, site = drawn
    lm = small()
    clean = lm.run(tokens, capture=site, logits=None)[site]
    run = lm.run(tokens, edits=case.edit, capture=site, logits=None)
    close(run[site][tokens.mask].double(), expected(case, clean, tokens)[tokens.mask], 1e-5)
    (receipt,) = run.receipts
    cells = {row: sorted(case.cells(row)) for row in range(len(tokens)) if case.cells(row)}
    assert dict(zip(receipt.rows, map(list, receipt.positions), strict=True)) == cells
    assert receipt.n_tokens == sum(map(len, cells.values()))


@settings(max_examples=25)
@given(st.permutations(range(3)), st.integers(0, 2))
def test_edits_at_one_site_apply_in_the_order_of_the_list(order: list[int], position: int) -> None:
    d = vector(D)
    edits = [
        cutaway.add(SITE, d, positions=position),
        cutaway.scale(SITE, -0.5, positions=position),
        cutaway.function(SITE, torch.tanh, positions=position),
    ]
    steps = [lambda x: x + d, lambda x: -0.5 * x, torch.tanh]
    tokens = batch()
    clean = small().run(tokens, capture=SITE)
    kept = clean[SITE].clone()
    run = small().run(tokens, edits=[edits[i] for i in order], capture=SITE)
    for row in range(3):
        x = clean[SITE][row, int(tokens.first[row]) + position]
        for i in order:
            x = steps[i](x)
        close(run[SITE][row, int(tokens.first[row]) + position], x)
    assert torch.equal(clean[SITE], kept), "an edit wrote into another run's capture"


def test_a_clamped_latent_is_read_less_its_offset_and_above_its_threshold() -> None:
    tokens, lm = batch(), small()
    encoder, decoder, offset = vector(D, 1), vector(D, 2), vector(D, 3)
    x = lm.run(tokens, capture=SITE)[SITE]
    h = (x - offset) @ encoder + 0.2
    positive = h[tokens.mask & (h > 0)].sort().values
    middle = len(positive) // 2
    for threshold in (0.0, float(positive[middle - 1 : middle + 1].mean())):  # between two values: none rounds over it
        edit = cutaway.clamp_latent(one_latent(SITE, encoder, 0.2, decoder, offset, threshold), 0, 0.7)
        activation = h * (h > threshold)
        assert bool((activation > 0).any())
        run = lm.run(tokens, edits=edit, capture=SITE)
        close(run[SITE][tokens.mask], (x + (0.7 - activation)[..., None] * decoder)[tokens.mask], 1e-5)


def test_a_patch_leaves_its_source_alone_and_captures_share_no_memory() -> None:
    source = small().run(batch(), capture=[SITE, Z])
    kept = {name: source[name].clone() for name in source.sites}
    edits = [cutaway.patch(SITE, source), cutaway.scale(SITE, 2.0), cutaway.patch(Z, source, heads=1)]
    run = small().run(batch(), edits=edits, capture=[SITE, Z, "blocks.2.resid_pre"])
    for name in run.sites:
        run[name].fill_(7.0)
    assert all(torch.equal(source[name], kept[name]) for name in source.sites)
    given = torch.zeros(D)
    edit = cutaway.set(SITE, given)
    given.fill_(5.0)
    assert not small().run([5, 6], edits=edit, capture=SITE)[SITE].any(), "an edit is what it was when it was made"


# Positions


def test_a_text_is_found_in_every_row(llama: LanguageModel) -> None:
    tokens = Tokens(
        torch.tensor([[1, 1, 5, 9, 7], [5, 6, 7, 8, 7]]),
        torch.tensor([[False, False, True, True, True], [True] * 5]),
        ((" the", " Dal", "las"), (" Dal", "las", " the", " Dal", "las")),
    )
    place = cutaway.at_token
    found = {
        place(" Dallas"): ((2,), (4,)),
        place(" Dallas", 0): ((2,), (1,)),
        place(" Dallas", "all"): ((2,), (1, 4)),
        place(" the"): ((0,), (2,)),
        place(7): ((2,), (4,)),
        place([5, 6]): (None, (1,)),
        place(" Dallas", 1): (None, (4,)),
        place(7, "all"): ((2,), (2, 4)),
    }
    for where, (first, second) in found.items():
        if first is None:
            with pytest.raises(CutawayError, match=r"row 0 (does not have it|has it only 1 times): ' the Dallas'"):
                llama.run(tokens, edits=cutaway.zero(SITE, positions=where))
            where = place(list(where.ids) if where.ids else str(where.text), where.occurrence, missing="skip")
        (receipt,) = llama.run(tokens, edits=cutaway.zero(SITE, positions=where)).receipts
        assert receipt.positions == ((second,) if first is None else (first, second)), where
    with pytest.raises(NothingEdited):
        llama.run(tokens, edits=cutaway.zero(SITE, positions=place(" Oakland", missing="skip")))


def test_a_patch_finds_its_place_in_both_runs(llama: LanguageModel) -> None:
    tokens, other = batch((6, 4)), batch((5, 7), "right", seed=3)
    source = llama.run(other, capture=SITE)
    at = cutaway.at_token(tokens.row_ids(0)[2], missing="skip")
    of = cutaway.at_token(other.row_ids(0)[4])
    run = llama.run(tokens, edits=cutaway.patch(SITE, source, positions=at, source_positions=of, rows=0), capture=SITE)
    assert torch.equal(run[SITE][0, 2], source[SITE][0, 4])
    tail = cutaway.patch(SITE, source, positions=slice(-2, None), source_positions=slice(0, 2))
    run = llama.run(tokens, edits=tail, capture=SITE)
    assert torch.equal(run[SITE][0, 4:], source[SITE][0, :2])
    assert torch.equal(run[SITE][1, 4:], source[SITE][1, :2])


def test_a_patched_pattern_keeps_its_keys_whatever_the_padding(llama: LanguageModel) -> None:
    """Key 1 of the source is key 1 of the run, also where padding stands at other sides."""
    site = "blocks.1.attn.pattern"
    rows = random_rows((6, 4), seed=8)
    sides = [pad_rows(rows, 1, side) for side in ("right", "left")]
    right, left = (Tokens(ids, mask, (("x",) * 6, ("x",) * 4)) for ids, mask in sides)
    source = llama.run(right, capture=site)
    patched = llama.run(left, edits=cutaway.patch(site, source), capture=site)
    assert patched.receipts[0].mean_abs_delta < 1e-6
    close(patched[site][1, :, 2:, 2:], source[site][1, :, :4, :4])


# Noise


def test_noise_has_its_spread_and_no_mean() -> None:
    site, std = "blocks.1.mlp.post", 0.7
    clean = small().run(batch(), capture=site)
    run = small().run(batch(), edits=cutaway.noise(site, std, seed=3), capture=site)
    drawn = ((run[site] - clean[site]) / std)[batch().mask].double()
    n = drawn.numel()
    assert abs(float(drawn.mean())) < 4 / n**0.5
    assert abs(float(drawn.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((drawn[0] * drawn[1]).mean())) < 4 / drawn.shape[1] ** 0.5
    assert torch.equal(run[site][~batch().mask], clean[site][~batch().mask])


@pytest.mark.parametrize("site", [SITE, Z, "blocks.1.attn.scores", "blocks.1.attn.pattern"])
def test_noise_is_the_same_alone_and_in_a_batch(site: str) -> None:
    edit = cutaway.noise(site, 0.5, seed=11)
    rows = random_rows(LENGTHS)
    after = f"{SITE[:9]}resid_post"
    runs = [small().run(batch(side=side), edits=edit, capture=after) for side in ("left", "right")]
    for i, row in enumerate(rows):
        alone = small().run(row, edits=edit, capture=after)
        for run in runs:
            close(run[after][i][run.tokens.mask[i]], alone[after][0], 2e-5)
    other = small().run(rows[0], edits=cutaway.noise(site, 0.5, seed=12), capture=after)
    assert not torch.equal(other[after][0], runs[1][after][0])


def test_noise_differs_by_row_position_site_and_seed() -> None:
    tokens = [[5, 6, 7, 8], [9, 6, 7, 8]]
    two = "blocks.0.resid_post"
    clean = small().run(tokens, capture=[two, SITE])
    edit = cutaway.noise("blocks.*.resid_post", 1.0, seed=0)
    run = small().run(tokens, edits=edit, capture=[two, SITE])
    first = run[two] - clean[two]
    assert len({round(float(v), 5) for v in first.flatten()}) == first.numel(), "no number twice"
    same = small().run([tokens[0]] * 2, edits=cutaway.noise(two, 1.0), capture=two)[two]
    assert torch.equal(same[0], same[1])
    several = small().run([tokens[0]] * 2, edits=cutaway.noise(two, 1.0, seed=[0, 1]), capture=two)[two]
    assert torch.equal(several[0], same[0])
    assert not torch.equal(several[1], same[1])
    heads = cutaway.noise(Z, 1.0, heads=[2])
    whole, part = (small().run(tokens, edits=e, capture=Z)[Z] for e in (cutaway.noise(Z, 1.0), heads))
    assert torch.equal(whole[:, :, 2], part[:, :, 2])
    with pytest.raises(CutawayError, match="3 seeds for 2 rows"):
        small().run(tokens, edits=cutaway.noise(two, 1.0, seed=[0, 1, 2]))


# Resampling


def test_resampling_takes_other_rows_drawn_with_a_seed() -> None:
    rows = random_rows((5,) * 6, seed=2)
    source = small().run(rows, capture=SITE)
    taken = set()
    for seed in range(6):
        edit = cutaway.resample(SITE, source, seed=seed)
        run = small().run(rows, edits=edit, capture=SITE)
        origins = [
            next(j for j in range(6) if torch.equal(run[SITE][i], source[SITE][j])) for i in range(6)
        ]  # each row is wholly one other row
        assert all(i != j for i, j in enumerate(origins))
        taken.add(tuple(origins))
        alone = small().run(rows[3], edits=edit, capture=SITE)
        assert torch.equal(alone[SITE][0], source[SITE][origins[3]]), "the draw is the row's own"
    assert len(taken) > 3


def test_resampling_draws_only_rows_that_are_long_enough() -> None:
    source = small().run(batch((6, 3, 6), "right", seed=5), capture=SITE)
    own = batch((5,), seed=7)
    for seed in range(8):
        run = small().run(own, edits=cutaway.resample(SITE, source, seed=seed), capture=SITE)
        assert any(torch.equal(run[SITE][0], source[SITE][j, :5]) for j in (0, 2))
    last = cutaway.resample(SITE, source, seed=1, positions=1)
    assert small().run(own, edits=last).receipts[0].positions == ((1,),)
    with pytest.raises(CutawayError, match="no other row that is long enough for row 0, of 8 tokens"):
        small().run(random_rows((8,)), edits=cutaway.resample(SITE, source, seed=0))


def test_resampling_by_a_map() -> None:
    rows = random_rows((5, 5), seed=2)
    source = small().run(random_rows((7, 6), seed=3), capture=SITE)
    maps = [{0: 6, 3: -1}, {4: 0, 1: 1}]
    run = small().run(rows, edits=cutaway.resample(SITE, source, positions=maps), capture=SITE)
    for row, (moved, length) in enumerate(zip(maps, (7, 6), strict=True)):
        for to, of in moved.items():
            assert torch.equal(run[SITE][row, to], source[SITE][row, of % length])
    pairs = cutaway.resample(SITE, source, positions={0: 2, 1: 2}, source_rows=[1, 1])
    run = small().run(rows, edits=pairs, capture=SITE)
    assert torch.equal(run[SITE][:, :2], source[SITE][1, 2].expand(2, 2, -1))


# Subspaces


def test_a_patch_within_a_subspace_changes_nothing_beside_it(of_family: Subjects) -> None:
    subject = of_family("gpt2")
    lm, basis = subject.lm, vector(3 * D).reshape(3, D)
    other = lm.run(random_rows((11,), seed=4), capture=SITE)
    clean = lm.run(subject.rows[0], capture=SITE)
    run = lm.run(subject.rows[0], edits=cutaway.patch(SITE, other).within(basis), capture=SITE)
    inside = torch.linalg.pinv(basis.double()) @ basis.double()  # the projection onto the span
    close(run[SITE].double() @ inside, other[SITE].double() @ inside)
    beside = torch.eye(D).double() - inside
    close(run[SITE].double() @ beside, clean[SITE].double() @ beside)
    both = lm.run(subject.rows[0], edits=cutaway.patch(SITE, other).within(torch.eye(D)), capture=SITE)
    close(both[SITE], other[SITE])
    gone = lm.run(subject.rows[0], edits=cutaway.zero(SITE).within(basis[0]), capture=SITE)
    close(gone[SITE], lm.run(subject.rows[0], edits=cutaway.project_out(SITE, basis[0]), capture=SITE)[SITE])


def test_a_basis_that_is_orthonormal_stays_as_it_is() -> None:
    assert torch.equal(cutaway.zero(SITE).within(-torch.eye(D)[3:5]).tensors["basis"], -torch.eye(D)[3:5])
    assert cutaway.zero(SITE).within(torch.ones(1, D).double()).tensors["basis"].dtype == torch.float64


def test_a_function_may_write_into_what_it_is_given(llama: LanguageModel) -> None:
    clean = llama.run([5, 6], capture=SITE)
    run = llama.run([5, 6], edits=cutaway.function(SITE, lambda x: x.mul_(2)), capture=SITE)
    assert torch.equal(run[SITE], 2 * clean[SITE])
    assert run.receipts[0].mean_abs_delta == pytest.approx(float(clean[SITE].abs().mean()), rel=1e-5)


def test_gradients_pass_through_functions_and_subspaces(llama: LanguageModel) -> None:
    basis = vector(2 * D).reshape(2, D)
    edits = [cutaway.function(SITE, lambda x: 3 * x), cutaway.scale(SITE, 0.0).within(basis)]
    options = {"capture": ["blocks.1.resid_pre"], "grad": lambda logits: logits[:, -1, 3]}
    grads = llama.run([5, 6, 7], edits=edits, **options).grads["blocks.1.resid_pre"]  # type: ignore[arg-type]
    step = 1e-2 * vector(D, 7)
    moved = [
        llama.run([5, 6, 7], edits=[cutaway.add("blocks.1.resid_pre", s * step, positions=1), *edits]).logits
        for s in (1, -1)
    ]
    assert moved[0] is not None
    assert moved[1] is not None
    slope = (moved[0] - moved[1])[0, -1, 3] / 2
    assert float(slope) == pytest.approx(float(grads[0, 1] @ step), rel=2e-2, abs=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cutaway.zero(SITE, neurons=32), r"neuron 32.*32 \(0 to 31\)"),
        (lambda: cutaway.zero(SITE, neurons=[]), "touch nothing"),
        (lambda: cutaway.zero("blocks.1.attn.pattern", neurons=0), "counts positions"),
        (lambda: cutaway.zero(SITE, neurons=0).within(torch.ones(1, D)), "either neurons or a basis"),
        (lambda: cutaway.zero(SITE).within(torch.ones(1, 31)), "31 entries.*32 wide"),
        (lambda: cutaway.zero(Z).within(torch.ones(2, 8)), "depend on each other"),
        (lambda: cutaway.zero(SITE).within(torch.zeros(1, D)), "is zero"),
        (lambda: cutaway.zero(SITE).within(torch.ones(2, 3, D)), "the shape"),
        (lambda: cutaway.zero(SITE).within(torch.full((1, D), float("nan"))), "NaN"),
        (lambda: cutaway.zero(SITE, positions=torch.zeros(3, 11, dtype=torch.bool)), "False everywhere"),
        (lambda: cutaway.zero(SITE, positions=torch.ones(11, dtype=torch.bool)), "batch, position"),
        (lambda: cutaway.zero(SITE, positions=torch.ones(2, 11, dtype=torch.bool)), r"\[2, 11\].*\[3, 11\]"),
        (lambda: cutaway.zero(SITE, positions=torch.ones(3, 11, dtype=torch.bool)), "names padding in row 1"),
        (lambda: cutaway.zero(SITE, positions=[True, False]), "whole numbers"),
        (lambda: cutaway.zero(SITE, positions=slice(20, None)), "touches no token"),
        (lambda: cutaway.zero(SITE, positions=slice(None, None, 0)), "step 0"),
        (lambda: cutaway.zero(SITE, positions=slice("a", None)), "whole numbers"),
        (lambda: cutaway.zero(SITE, positions=cutaway.at_token("")), "text or token ids"),
        (lambda: cutaway.zero(SITE, positions=cutaway.at_token("absent")), "row 0 does not have it"),
        (lambda: cutaway.zero(SITE, positions=cutaway.at_token(1.5)), "whole numbers"),  # type: ignore[arg-type]
        (lambda: cutaway.zero(SITE, positions=cutaway.at_token(1, missing="no")), "missing="),  # type: ignore[arg-type]
        (lambda: cutaway.noise(SITE, -1.0), "0 or more"),
        (lambda: cutaway.noise(SITE, float("inf")), "finite"),
        (lambda: cutaway.noise(SITE, "much"), "is a number"),  # type: ignore[arg-type]
        (lambda: cutaway.noise(SITE, 1.0, seed="x"), "seed"),  # type: ignore[arg-type]
        (lambda: cutaway.function(SITE, 3), "Python function"),  # type: ignore[arg-type]
        (lambda: cutaway.function(SITE, "never registered"), "No edit function is registered"),
        (lambda: cutaway.function(SITE, lambda x: x[..., :3]), r"returned a tensor of shape \[22, 3\]"),
        (lambda: cutaway.function(SITE, lambda x: None), "returned a NoneType"),  # type: ignore[arg-type,return-value]
        (lambda: cutaway.function(SITE, lambda x: x / 0), "NaN or infinity"),
        (lambda: cutaway.resample(SITE, torch.ones(3, 11, D)), r"needs positions=\{to: from\}"),
        (lambda: cutaway.resample(SITE, torch.ones(3, 11, D), positions={}), "touch nothing"),
        (lambda: cutaway.resample(SITE, torch.ones(3, 11, D), positions=[{0: 1}]), "1 lists for 3 rows"),
        (lambda: cutaway.resample(SITE, torch.ones(3, 11, D), positions={0: 11}), "Position 11 is outside"),
        (lambda: cutaway.resample(SITE, torch.ones(3, 11, D), seed=1, source_rows=[0, 1, 2]), "not both"),
        (lambda: cutaway.resample(SITE, torch.ones(1, 11, D), seed=1), "no other row"),
        (lambda: cutaway.clamp_latent(one_latent(SITE, torch.ones(D), 0, torch.ones(D)), 1, 1.0), "no latent 1"),
        (lambda: cutaway.zero(3), "or a dictionary; got 3"),  # type: ignore[arg-type]
        (
            lambda: cutaway.patch(SITE, torch.ones(3, 11, D), positions=0, source_positions=cutaway.at_token("x")),
            "has no tokens",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_in_one_sentence(of_family: Subjects, make, words: str) -> None:
    subject = of_family("llama")
    with pytest.raises(CutawayError, match=words) as raised:
        subject.lm.run(subject.tokens(), edits=make())
    assert "\n" not in str(raised.value)


def test_a_run_of_another_model_is_refused_as_a_source(llama: LanguageModel) -> None:
    other = attach(tiny_model("llama", seed=1), name="another")
    source = other.run([5, 6, 7], capture=SITE)
    with pytest.raises(CutawayError, match=r"run of another model \(another, weights .*other_model=True"):
        llama.run([5, 6, 7], edits=cutaway.patch(SITE, source))
    run = llama.run([5, 6, 7], edits=cutaway.patch(SITE, source, other_model=True), capture=SITE)
    assert torch.equal(run[SITE], source[SITE])
    again = attach(llama.hf)  # the same weights, seen a second time
    assert again.run([5, 6, 7], edits=cutaway.patch(SITE, llama.run([5, 6, 7], capture=SITE))).receipts


def test_other_calls_refuse_what_does_not_fit(llama: LanguageModel) -> None:
    tokens = batch()
    with pytest.raises(CutawayError, match="no row 3"):
        tokens.find(3, "x")
    with pytest.raises(CutawayError, match="no row 9"):
        tokens.column(9, 0)
    for metric in (lambda logits: logits[:, -1, :3], lambda logits: logits):
        with pytest.raises(CutawayError, match="one number, or one a row"):
            llama.run([[5, 6], [7, 8]], capture=SITE, grad=metric)
    assert llama.n_heads == HEADS
