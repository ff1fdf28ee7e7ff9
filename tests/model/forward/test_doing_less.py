"""Stopping early, resuming late and refusing what would not fit: the same bits for less work."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from subject import Subject, Subjects, close
from tiny import LAYERS, tiny_model
from torch import Tensor, nn

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.forward.run import Run, capture_bytes
from cutaway.model.language_model import LanguageModel, attach


@contextmanager
def counting(subject: Subject) -> Iterator[list[str]]:
    """The modules whose forward ends, in order: layers, their attention and MLP, the unembedding."""
    names, ran, handles = subject.by_hand.names, [], []
    watched = {f"{names.layers}.{i}": f"layer {i}" for i in range(LAYERS)}
    watched |= {f"{names.layers}.{i}.{names.mlp}": f"mlp {i}" for i in range(LAYERS)}
    watched |= {f"{names.layers}.{i}.{names.attention}": f"attention {i}" for i in range(LAYERS)}
    watched |= {names.head: "head"}
    for path, label in watched.items():

        def note(_m: nn.Module, _args: object, _output: object, label: str = label) -> None:
            ran.append(label)

        handles.append(subject.hf.get_submodule(path).register_forward_hook(note))
    yield ran
    for handle in handles:
        handle.remove()


def logits_of(run: Run) -> Tensor:
    assert run.logits is not None
    return run.logits


# Stopping


def test_a_run_without_logits_stops_after_its_last_site(subject: Subject) -> None:
    tokens = subject.tokens()
    full = subject.lm.run(tokens, capture=subject.lm.sites().present())
    for site, last in (
        ("embed", []),
        ("blocks.0.attn.z", []),
        ("blocks.1.resid_pre", ["attention 0", "mlp 0", "layer 0"]),
        ("blocks.1.attn.out", ["attention 0", "mlp 0", "layer 0"]),
        ("blocks.1.mlp.out", ["attention 0", "mlp 0", "layer 0", "attention 1"]),
    ):
        with counting(subject) as ran:
            run = subject.lm.run(tokens, capture=[site, "blocks.0.resid_pre"], logits=None)
        # a user's own hook on the very module runs or not; what lies behind it may not
        assert [name for name in ran if name in last] == last, site
        assert not {*ran} & {"head", "layer 1", "layer 2", "attention 2"}, site
        assert run.logits is None
        close(run[site][tokens.mask], full[site][tokens.mask], 2e-5)
    with counting(subject) as ran:
        assert subject.lm.run(tokens, capture="logits", logits=None).logits is None
    assert "head" in ran


def test_a_stopped_run_has_its_edits_and_their_receipts(llama: LanguageModel) -> None:
    edit = cutaway.add("blocks.0.resid_post", torch.ones(llama.d_model))
    stopped = llama.run([5, 6], capture="blocks.1.attn.out", edits=edit, logits=None)
    full = llama.run([5, 6], capture="blocks.1.attn.out", edits=edit)
    assert torch.equal(stopped["blocks.1.attn.out"], full["blocks.1.attn.out"])
    assert stopped.receipts == full.receipts


def test_only_the_last_token_is_unembedded(subject: Subject) -> None:
    shapes = []
    handle = subject.hf.get_submodule(subject.by_hand.names.head).register_forward_hook(
        lambda _m, _args, output: shapes.append(tuple(output.shape))
    )
    subject.lm.run(subject.tokens(), logits="last")
    handle.remove()
    assert shapes == [(3, 1, subject.lm.d_vocab)]


# Resuming


@pytest.mark.parametrize("side", ["right", "left"])
def test_resuming_gives_the_same_bits_without_the_layers_below(subject: Subject, side: str) -> None:
    lm, tokens = subject.lm, subject.tokens(side)
    base = lm.run(tokens, capture=["blocks.*.resid_pre", "blocks.1.resid_post"])
    d = torch.linspace(-1, 1, lm.d_model)
    for layer in range(LAYERS):
        edits = [cutaway.add(f"blocks.{layer}.attn.out", d, positions=-1), cutaway.scale("blocks.2.mlp.post", 0.5)]
        capture = [f"blocks.{layer}.resid_post", f"blocks.{layer}.attn.pattern"]
        full = lm.run(tokens, edits=edits, capture=capture)
        with counting(subject) as ran:
            short = lm.run(tokens, edits=edits, capture=capture, resume=base)
        assert torch.equal(logits_of(short)[tokens.mask], logits_of(full)[tokens.mask])
        assert all(torch.equal(short[name], full[name]) for name in capture)
        assert short.receipts == full.receipts
        assert [name for name in ran if name.startswith("mlp")] == [f"mlp {i}" for i in range(layer, LAYERS)]


def test_resuming_without_edits_and_from_the_layer_below(subject: Subject) -> None:
    lm, tokens = subject.lm, subject.tokens()
    base = lm.run(tokens, capture="blocks.0.resid_post")
    with counting(subject) as ran:
        again = lm.run(tokens, resume=base, capture="blocks.1.resid_pre")
    assert torch.equal(logits_of(again), logits_of(base))
    assert torch.equal(again["blocks.1.resid_pre"], base["blocks.0.resid_post"])
    assert "mlp 0" not in ran


def test_resuming_one_row_many_times(subject: Subject) -> None:
    lm, row = subject.lm, subject.rows[0]
    base = lm.run(row, capture="blocks.1.resid_pre")
    many = lm.tokens(row).repeat(5)
    edits = [cutaway.scale("blocks.1.attn.z", 0.0, heads=i % 4, rows=i) for i in range(5)]
    short, full = lm.run(many, edits=edits, resume=base), lm.run(many, edits=edits)
    close(logits_of(short), logits_of(full))
    for i in range(5):
        alone = lm.run(row, edits=cutaway.scale("blocks.1.attn.z", 0.0, heads=i % 4))
        close(logits_of(short)[i], logits_of(alone)[0])


def test_resuming_where_it_cannot_runs_everything(subject: Subject) -> None:
    """Sites below the stream that is held, or no stream at all: a full run, not a wrong one."""
    lm, tokens = subject.lm, subject.tokens()
    held = lm.run(tokens, capture=["blocks.2.resid_pre", "blocks.1.attn.out"])
    for site in ("embed", "blocks.0.mlp.out", "blocks.1.resid_pre"):
        edit = cutaway.scale(site, 0.5, positions=0)
        with counting(subject) as ran:
            short = lm.run(tokens, edits=edit, resume=held)
        assert torch.equal(logits_of(short), logits_of(lm.run(tokens, edits=edit)))
        assert "mlp 0" in ran


def test_what_the_source_edited_is_not_taken_over(llama: LanguageModel) -> None:
    sites = "blocks.*.resid_pre"
    clean = logits_of(llama.run([5, 6, 7]))
    later = cutaway.zero("blocks.2.mlp.out", positions=1)
    wanted = logits_of(llama.run([5, 6, 7], edits=later))
    for edit in (
        cutaway.scale("embed", 2.0),
        cutaway.scale("blocks.1.mlp.out", 2.0),
        cutaway.scale("blocks.2.resid_pre", 2.0),
        cutaway.scale("blocks.2.mlp.out", 2.0),
    ):
        source = llama.run([5, 6, 7], edits=edit, capture=sites)
        assert torch.equal(logits_of(llama.run([5, 6, 7], resume=source)), clean)
        assert torch.equal(logits_of(llama.run([5, 6, 7], resume=source, edits=later)), wanted)


def test_gradients_above_the_point_of_resuming(subject: Subject) -> None:
    lm, tokens = subject.lm, subject.tokens()
    base = lm.run(tokens, capture="blocks.1.resid_pre")
    sites = ["blocks.1.resid_pre", "blocks.1.attn.q", "blocks.2.mlp.post"]
    full = lm.run(tokens, capture=sites, grad=lambda x: x[:, 3].tanh().sum(-1))
    short = lm.run(tokens, capture=sites, grad=lambda x: x[:, 3].tanh().sum(-1), resume=base)
    for site in sites:
        assert float(full.grads[site].abs().max()) > 0
        close(short.grads[site], full.grads[site], 1e-6)
    assert not base["blocks.1.resid_pre"].requires_grad


def test_resuming_from_something_else_is_refused(of_family: Subjects) -> None:
    subject = of_family("llama")
    lm, rows = subject.lm, [[5, 6, 7], [8, 9, 10]]
    base = lm.run(rows, capture="blocks.*.resid_pre")
    for inputs in ([[5, 6, 7], [8, 9, 11]], [[5, 6, 7]], [[5, 6], [8, 9]], [[5, 6, 7]] * 3):
        with pytest.raises(CutawayError, match="resume="):
            lm.run(inputs, resume=base)
    other = attach(tiny_model("llama", seed=1)).run(rows, capture="blocks.*.resid_pre")
    with pytest.raises(CutawayError, match="another model"):
        lm.run(rows, resume=other)
    left, right = subject.tokens("left", [[1, 5, 6], [7, 8]]), subject.tokens("right", [[1, 5, 6], [1, 7, 8]])
    assert torch.equal(left.ids, right.ids)
    with pytest.raises(CutawayError, match="these differ"):
        lm.run(left, resume=lm.run(right, capture="blocks.1.resid_pre"))


# What would not fit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_estimate_is_what_captures_hold(family: str, dtype: torch.dtype) -> None:
    lm = attach(tiny_model(family).to(dtype=dtype))  # type: ignore[call-arg]
    names = lm.sites().present()
    run = lm.run([[5, 6, 7], [8, 9]], capture=names)
    for name in names:
        held = run[name].untyped_storage().nbytes()
        assert capture_bytes(lm.sites(), [name], 2, 3, dtype.itemsize) == held, name
    total = sum(run[name].untyped_storage().nbytes() for name in names)
    lm.run([[5, 6, 7], [8, 9]], capture=names, limit_bytes=total)
    with pytest.raises(CutawayError, match="above the limit"):
        lm.run([[5, 6, 7], [8, 9]], capture=names, limit_bytes=total - 1)


def test_a_capture_above_the_limit_is_refused_before_anything_runs(of_family: Subjects) -> None:
    subject = of_family("llama")
    with counting(subject) as ran, pytest.raises(CutawayError) as raised:
        subject.lm.run(torch.full((400, 60), 5), capture=["blocks.*.attn.pattern", "embed"], limit_bytes=2**24)
    assert not ran
    gib = (400 * 60 * 32 * 4 + 3 * 400 * 4 * 60 * 60 * 4) / 2**30
    assert f"would hold {gib:.2f} GiB, above the limit of 0.02 GiB" in str(raised.value)
    assert "largest: 'blocks.0.attn.pattern'" in str(raised.value)
    assert "raise limit_bytes" in str(raised.value)
    with pytest.raises(CutawayError, match="limit"):
        subject.lm.run([5, 6], capture="embed", limit_bytes=0)


def test_there_is_a_limit_by_default(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutaway.model.language_model.CAPTURE_LIMIT", 100)
    with pytest.raises(CutawayError, match="limit"):
        llama.run([5, 6], capture="embed")
    assert llama.run([5, 6]).sites == ()
    assert llama.run([5, 6], capture="embed", limit_bytes=10**6).sites == ("embed",)
