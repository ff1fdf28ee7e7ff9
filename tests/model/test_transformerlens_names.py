"""TransformerLens' spellings: each names one of our sites, and where it depends on the model, the right one."""

import re
from pathlib import Path

import pytest
from tiny import FAMILIES, tiny_model

import cutaway
from cutaway.model.aliases import ALIASES, BEFORE_A_NORM
from cutaway.model.sites import KINDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-transformerlens.md"


def resolve(family: str, name: str) -> str:
    return cutaway.attach(tiny_model(family)).sites().resolve(name)


def test_every_spelling_names_sites_of_the_contract() -> None:
    assert {name for ours in ALIASES.values() for name in ours} <= set(KINDS)
    assert not set(ALIASES) & set(KINDS)
    assert set(BEFORE_A_NORM) <= set(ALIASES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_resolves_or_says_why_not(family: str) -> None:
    table = cutaway.attach(tiny_model(family)).sites()
    here = set(table.present())
    for theirs, ours in ALIASES.items():
        name = theirs.replace("{l}", "1")
        present = [site for site in (one.replace("{l}", "1") for one in ours) if site in here]
        norm = BEFORE_A_NORM.get(theirs, "none").replace("{l}", "1")
        if present and norm not in here:
            assert table.resolve(name) == present[0]
        else:
            with pytest.raises(cutaway.CutawayError, match=r"before a norm|has no site"):
                table.resolve(name)


@pytest.mark.parametrize(
    ("family", "theirs", "ours"),
    [
        ("gpt2", "blocks.2.mlp.in.hook_out", "blocks.2.mlp.pre"),
        ("llama", "blocks.2.mlp.in.hook_out", "blocks.2.mlp.pre_linear"),
        ("llama", "blocks.2.mlp.gate.hook_out", "blocks.2.mlp.pre"),
        ("llama", "blocks.2.ln2.hook_in", "blocks.2.resid_mid"),
        ("neox", "blocks.2.ln2.hook_in", "blocks.2.resid_pre"),
        ("llama", "blocks.0.hook_mlp_in", "blocks.0.resid_mid"),
        ("llama", "blocks.0.mlp.hook_in", "blocks.0.mlp.in"),
        ("llama", "blocks.0.attn.hook_out", "blocks.0.attn.out"),
        ("gemma2", "blocks.0.ln1_post.hook_out", "blocks.0.attn.out"),
        ("gemma2", "blocks.0.hook_attn_out", "blocks.0.attn.out"),
        ("gemma2", "hook_unembed", "logits_precap"),
        ("llama", "hook_unembed", "logits"),
    ],
)
def test_what_a_spelling_means_depends_on_the_model(family: str, theirs: str, ours: str) -> None:
    assert resolve(family, theirs) == ours


@pytest.mark.parametrize("theirs", ["attn.hook_out", "attn.o.hook_out", "mlp.hook_out", "mlp.out.hook_out"])
def test_a_module_before_its_own_norm_is_refused_with_what_is_there(theirs: str) -> None:
    with pytest.raises(cutaway.CutawayError, match=r"before a norm.*'blocks\.\{l\}\.(attn|mlp)\.out'"):
        resolve("gemma2", f"blocks.1.{theirs}")


def test_wildcards_take_spellings_too() -> None:
    table = cutaway.attach(tiny_model("neox")).sites()
    assert table.expand("blocks.*.ln2.hook_in") == [f"blocks.{layer}.resid_pre" for layer in range(3)]
    assert table.expand("blocks.{0..1}.attn.o.hook_in") == ["blocks.0.attn.z", "blocks.1.attn.z"]


def test_the_page_names_what_is_understood_and_all_of_it() -> None:
    text = PAGE.read_text()
    table = text.split("<!-- names: make docs -->")[1].split("<!-- end -->")[0]
    assert set(re.findall(r"`([^`]+)`", table)) == {*ALIASES, *(name for ours in ALIASES.values() for name in ours)}
    for name in re.findall(r'"(blocks\.\d+\.[\w.]*hook_\w+)"', text):
        assert resolve("llama", re.sub(r"\d+", "1", name, count=1))
