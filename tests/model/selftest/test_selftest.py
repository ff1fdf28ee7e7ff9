"""The self-test holds on every family, and every planted fault makes it fail, naming the layer and the site."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from subject import Subject, Subjects
from tiny import LAYERS, tiny_model
from torch import Tensor, nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.forward.execution import Execution
from cutaway.model.forward.hooks import Installer
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.selftest.result import SelfTest


def test_every_family_passes(subject: Subject) -> None:
    test = subject.lm.selftest()
    assert test.passed, str(test)
    assert test.failures() == []
    test.require()
    checked = {(row.check, row.layer) for row in test.checks}
    assert len(checked) == len(test.checks)
    for site in subject.lm.sites():
        if site.absent is None:
            short = site.name.removeprefix(f"blocks.{site.layer}.")
            assert any(short in check and layer == site.layer for check, layer in checked), site.name
    assert f"self-test of tiny {subject.family} in float32: passed" in str(test)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "qwen3"])
def test_every_dtype_passes(of_family: Subjects, family: str, dtype: torch.dtype) -> None:
    test = attach(copy.deepcopy(of_family(family).hf).to(dtype=dtype)).selftest()  # type: ignore[call-arg]
    assert test.passed, str(test)


def test_a_short_context_and_odd_shapes(of_family: Subjects) -> None:
    model = tiny_model("gpt2", n_positions=5, n_head=1)
    assert attach(model).selftest().passed
    grouped = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=10, num_hidden_layers=1)
    assert attach(grouped).selftest().passed


# Faults planted in how a site is read or written


def caught(lm: LanguageModel, site: str) -> SelfTest:
    """The self-test fails, on this layer (the next reads what this one writes), in a check that names the site."""
    test = lm.selftest()
    failures = test.failures()
    layer = lm.sites()[site].layer
    short = site.removeprefix(f"blocks.{layer}.")
    assert not test.passed
    near = {None, 0, LAYERS - 1} if layer is None else {None, layer - 1, layer, layer + 1}
    assert {row.layer for row in failures} <= near
    assert any(short in row.check for row in failures if row.layer in (layer, None)), str(test)
    with pytest.raises(CutawayError, match="fails its self-test"):
        test.require()
    assert "FAIL" in str(test)
    return test


def faulty_sites(subject: Subject, only: str = "") -> list[str]:
    return [
        s
        for s in subject.lm.sites().present()
        if (not s.startswith("blocks.") or s.startswith("blocks.1.")) and only in s
    ]


def read_wrongly(monkeypatch: pytest.MonkeyPatch, site: str, fault: Any) -> None:
    right = Execution.record

    def record(self: Execution, name: str, value: Tensor, *, own: bool = False) -> Tensor:
        if name != site or name not in self.capture:
            return right(self, name, value)
        right(self, name, fault(value))
        return value

    monkeypatch.setattr(Execution, "record", record)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_site_that_is_read_slightly_wrong_is_caught(
    of_family: Subjects, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    subject = of_family(family)
    for site in faulty_sites(subject):
        with monkeypatch.context() as patch:
            read_wrongly(patch, site, lambda x: x * 1.02)
            caught(subject.lm, site)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_heads_off_by_one_are_caught(of_family: Subjects, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    subject = of_family(family)
    for site in faulty_sites(subject, ".attn."):
        if subject.lm.sites()[site].kind.has_heads:
            dim = 1 if site.endswith((".scores", ".pattern")) else 2
            with monkeypatch.context() as patch:
                read_wrongly(patch, site, lambda x, dim=dim: x.roll(1, dim))
                caught(subject.lm, site)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_silently_ignored_edit_is_caught(of_family: Subjects, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The receipt says it was made, the value is the old one."""
    subject = of_family(family)
    right = Execution.edit
    for site in faulty_sites(subject):

        def ignored(self: Execution, name: str, value: Tensor, site: str = site) -> Tensor:
            new = right(self, name, value)
            return value if name == site else new

        with monkeypatch.context() as patch:
            patch.setattr(Execution, "edit", ignored)
            caught(subject.lm, site)


def test_an_edit_of_the_wrong_row_or_head_is_caught(of_family: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, right = of_family("llama"), Execution.edit
    for site in ("blocks.1.attn.z", "blocks.1.attn.v", "blocks.1.attn.result", "blocks.1.attn.rot_q"):
        for dim in (0, 2):

            def moved(self: Execution, name: str, value: Tensor, site: str = site, dim: int = dim) -> Tensor:
                new = right(self, name, value)
                return value + (new - value).roll(1, dim) if name == site else new

            with monkeypatch.context() as patch:
                patch.setattr(Execution, "edit", moved)
                caught(subject.lm, site)


@pytest.mark.parametrize("part", ["attn.in", "mlp.in"])
def test_reading_before_instead_of_after_a_norm_is_caught(
    of_family: Subjects, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The site's hook sits on the norm instead of on the module behind it. Names, shapes and logits stay right."""
    lm = of_family("llama").lm
    plain, layer, right = lm.run([5, 6, 7]).logits, lm.family.layers[1], Installer.before
    assert layer.ln1 is not None
    assert layer.ln2 is not None
    module, norm = (layer.attention, layer.ln1.module) if part == "attn.in" else (layer.mlp, layer.ln2.module)

    def before(self: Installer, at: nn.Module, change: Any) -> None:
        right(self, norm if at is module else at, change)

    monkeypatch.setattr(Installer, "before", before)
    run = lm.run([5, 6, 7], capture=f"blocks.1.{part}")
    assert run.logits is not None
    assert plain is not None
    assert torch.equal(run.logits, plain)
    assert run[f"blocks.1.{part}"].shape == (1, 3, lm.d_model)
    caught(lm, f"blocks.1.{part}")


def test_an_output_projection_that_is_more_than_its_weight_is_caught() -> None:
    """As with an adapter that is not merged: attn.result, computed from the weight, would not be what is written."""
    model = tiny_model("llama")
    output = model.get_submodule("model.layers.1.self_attn.o_proj")

    def adapted(_m: nn.Module, _args: Any, written: Tensor) -> Tensor:
        return 1.1 * written

    output.register_forward_hook(adapted)
    test = caught(attach(model), "blocks.1.attn.result")
    assert test.failures()[0].layer == 1


def test_a_row_that_a_batch_changes_is_caught(of_family: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of one row that leaks into the others: the row without an edit is not the row alone."""
    lm, right = of_family("llama").lm, Execution.edit

    def leaking(self: Execution, name: str, value: Tensor) -> Tensor:
        new = right(self, name, value)
        return new if new is value else new + 0.01 * (new - value).abs().max()

    monkeypatch.setattr(Execution, "edit", leaking)
    checks = {row.check for row in lm.selftest().failures()}
    assert "a row of a batch without an edit = the row alone" in checks


def test_not_a_number_is_a_failure(of_family: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = of_family("llama")
    read_wrongly(monkeypatch, "blocks.2.mlp.post", lambda x: x * float("nan"))
    test = subject.lm.selftest()
    assert any(row.layer == 2 and row.residual == float("inf") for row in test.failures())
    assert all(row.layer in (None, *range(LAYERS)) for row in test.checks)


def test_few_forwards_and_captures_of_their_own_rows(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of a site in the second forward are the rows that edit its layer, not all of them."""
    calls, right = [], Execution.forward

    def counted(self: Execution, call: Any) -> Any:
        out = right(self, call)
        calls.append((len(self.mask), {name: len(value) for name, value in self.values.items()}))
        return out

    monkeypatch.setattr(Execution, "forward", counted)
    forwards = 0

    def count(_m: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal forwards
        forwards += 1

    handle = subject.hf.register_forward_hook(count)
    subject.lm.selftest()
    handle.remove()
    (one, _), (rows, held), *small = calls
    assert len(calls) == 5
    assert forwards == 3  # two stop behind the last layer
    assert one == 1
    assert all(n <= 2 for n, _ in small)
    assert rows > 20 * LAYERS
    assert max(n for name, n in held.items() if name.startswith("blocks.1.") and "resid_pre" not in name) < rows / 2


def test_weights_that_are_no_numbers_are_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(CutawayError, match=r"hold NaN or infinity \(first: model.layers.1.mlp.up_proj.weight\)"):
        attach(model).selftest()


def test_a_self_test_is_a_result(llama: LanguageModel) -> None:
    test = llama.selftest()
    assert len(repr(test).splitlines()) <= 12
    assert f"all {len(test.checks)} checks pass" in repr(test)
    assert {row["ok"] for row in test.rows()} == {True}
    assert test.to_json()["passed"] is True
    assert "<svg" in test.drawing()
    broken = replace(test, checks=(replace(test.checks[0], residual=0.5), *test.checks[1:]))
    assert "FAILS at layer" in repr(broken)
