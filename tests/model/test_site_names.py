"""The site contract: names, wildcards, aliases, what is absent and why."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subject import Subject, Subjects
from tiny import LAYERS, tiny_model

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.sites import KINDS

# TransformerLens' spelling of every hook that has a site here, as its documentation lists them.
TRANSFORMER_LENS = {
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    "blocks.1.hook_resid_pre": "blocks.1.resid_pre",
    "blocks.1.hook_resid_mid": "blocks.1.resid_mid",
    "blocks.1.hook_resid_post": "blocks.1.resid_post",
    "blocks.1.hook_mlp_in": "blocks.1.resid_mid",
    "blocks.1.hook_attn_out": "blocks.1.attn.out",
    "blocks.1.hook_mlp_out": "blocks.1.mlp.out",
    "blocks.1.ln1.hook_scale": "blocks.1.ln1.scale",
    "blocks.1.ln1.hook_normalized": "blocks.1.ln1.normalized",
    "blocks.1.ln2.hook_scale": "blocks.1.ln2.scale",
    "blocks.1.ln2.hook_normalized": "blocks.1.ln2.normalized",
    "blocks.1.attn.hook_q": "blocks.1.attn.q",
    "blocks.1.attn.hook_k": "blocks.1.attn.k",
    "blocks.1.attn.hook_v": "blocks.1.attn.v",
    "blocks.1.attn.hook_rot_q": "blocks.1.attn.rot_q",
    "blocks.1.attn.hook_rot_k": "blocks.1.attn.rot_k",
    "blocks.1.attn.hook_attn_scores": "blocks.1.attn.scores",
    "blocks.1.attn.hook_pattern": "blocks.1.attn.pattern",
    "blocks.1.attn.hook_z": "blocks.1.attn.z",
    "blocks.1.attn.hook_result": "blocks.1.attn.result",
    "blocks.1.mlp.hook_pre": "blocks.1.mlp.pre",
    "blocks.1.mlp.hook_pre_linear": "blocks.1.mlp.pre_linear",
    "blocks.1.mlp.hook_post": "blocks.1.mlp.post",
    "ln_final.hook_scale": "ln_final.scale",
    "ln_final.hook_normalized": "ln_final.normalized",
}


def test_transformerlens_names_resolve_and_are_never_stored(of_family: Subjects) -> None:
    for family in ("llama", "gpt2", "gemma2"):
        lm = of_family(family).lm
        table = lm.sites()
        for name, ours in TRANSFORMER_LENS.items():
            if lm.family.absent(ours.replace("blocks.1.", "blocks.{l}.")):
                with pytest.raises(CutawayError, match="no site"):
                    table.resolve(name)
                continue
            assert table.resolve(name) == ours
            run = lm.run([5, 6, 7], capture=name)
            assert run.sites == (ours,)
            assert run[name] is run[ours]
    assert of_family("llama").lm.sites().expand("blocks.*.hook_resid_post") == [
        f"blocks.{i}.resid_post" for i in range(LAYERS)
    ]


def test_unembeddings_output_precedes_a_softcap(of_family: Subjects) -> None:
    assert of_family("gemma2").lm.sites().resolve("unembed.hook_out") == "logits_precap"
    assert of_family("llama").lm.sites().resolve("unembed.hook_out") == "logits"


REASONS = {
    ("llama", "pos_embed"): "rotary",
    ("neox", "pos_embed"): "rotary",
    ("neox", "blocks.0.resid_mid"): "parallel residual",
    ("neox", "blocks.*.hook_resid_mid"): "parallel residual",
    ("gpt2", "blocks.1.mlp.pre_linear"): "not gated",
    ("neox", "blocks.1.mlp.pre_linear"): "not gated",
    ("llama", "blocks.1.ln1_post.scale"): "no norm after",
    ("llama", "logits_precap"): "no final softcap",
}


@pytest.mark.parametrize(("family", "site"), list(REASONS))
def test_an_absent_site_says_why(of_family: Subjects, family: str, site: str) -> None:
    with pytest.raises(CutawayError, match=REASONS[family, site]) as raised:
        of_family(family).lm.run([5, 6], capture=site)
    assert site in str(raised.value)


def test_which_sites_each_family_has(subject: Subject) -> None:
    family = subject.family
    lacking = {site.kind.name for site in subject.lm.sites() if site.absent}
    expected = {f"blocks.{{l}}.mlp.{name}" for name in ("router.logits", "router.weights", "experts.{e}.out")}
    if family != "gpt2":
        expected.add("pos_embed")
    if family == "neox":
        expected.add("blocks.{l}.resid_mid")
    if family in ("gpt2", "neox", "neox_sequential"):
        expected.add("blocks.{l}.mlp.pre_linear")
    if family not in ("gemma2", "gemma3"):
        expected |= {f"blocks.{{l}}.{n}_post.{p}" for n in ("ln1", "ln2") for p in ("scale", "normalized")}
    if family != "gemma2":
        expected.add("logits_precap")
    assert lacking == expected
    assert len(subject.lm.sites()) == len([k for k in KINDS if "{l}" not in k]) + LAYERS * len(
        [k for k in KINDS if "{l}" in k]
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.1.resid_pots", "did you mean 'blocks.1.resid_post' or 'blocks.1.resid_pre'"),
        ("blocks.1.hook_resid_pst", "did you mean"),
        ("resid_post", "There is no site 'resid_post'"),
        ("", "There is no site"),
        ("blocks.x.resid_post", "There is no site"),
        ("blocks.-1.resid_post", "There is no site"),
        ("blocks.{0..7}.resid_post", "layer 7, but this model's layers are 0 to 2"),
        ("blocks.{2..1}.resid_post", "counts downwards"),
        ("blocks.99.attn.z", "layer 99"),
        ("blocks.*", "There is no site"),
        ("*.resid_post", "There is no site"),
        ("blocks.1.resid_post ", "There is no site"),
        ("blocks." + "9" * 5000 + ".resid_post", "far too high a number"),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_sentence(llama: LanguageModel, name: str, words: str) -> None:
    with pytest.raises(CutawayError) as raised:
        llama.run([5, 6], capture=name)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_name_is_text(llama: LanguageModel) -> None:
    run = llama.run([5, 6], capture="embed")
    for name in (3, None, b"embed"):
        with pytest.raises(CutawayError, match="named by text"):
            run[name]  # type: ignore[index]


def test_one_site_where_one_is_needed(llama: LanguageModel) -> None:
    run = llama.run([5, 6], capture="blocks.*.resid_post")
    with pytest.raises(CutawayError, match="3 sites where one is needed"):
        run["blocks.*.resid_post"]
    with pytest.raises(CutawayError, match=r"did not capture 'blocks.0.attn.z' \(it holds blocks.0.resid_post"):
        run["blocks.0.attn.z"]
    with pytest.raises(CutawayError, match="it holds nothing"):
        llama.run([5, 6])["embed"]
    assert run.grads == {}
    with pytest.raises(CutawayError, match="grad="):
        run.grads["embed"]
    with_grad = llama.run([5, 6], capture="blocks.0.resid_post", grad=lambda x: x.sum())
    assert with_grad.grads["blocks.0.hook_resid_post"] is with_grad.grads["blocks.0.resid_post"]


LAYERS_OF = {
    "*": (0, LAYERS - 1), "0": (0, 0), "1": (1, 1), "2": (2, 2),
    "{0..1}": (0, 1), "{1..2}": (1, 2), "{2..2}": (2, 2), "{0..2}": (0, 2),
}  # fmt: skip
_table = attach(tiny_model("gemma2")).sites()
_PRESENT = sorted({site.kind.name for site in _table if site.layer is not None and not site.absent})


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(_PRESENT),
            st.sampled_from(list(LAYERS_OF)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_patterns_expand_as_brute_force(parts: list[tuple[str, str]]) -> None:
    """Every site of the model is asked in turn whether one of the patterns names it."""
    patterns = [kind.replace("{l}", layers) for kind, layers in parts]

    def named(site: str, layer: int | None) -> bool:
        for kind, layers in parts:
            low, high = LAYERS_OF[layers]
            if layer is not None and low <= layer <= high and site == kind.replace("{l}", str(layer)):
                return True
        return False

    expected = [site.name for site in _table if named(site.name, site.layer)]
    assert _table.expand_all(patterns) == expected
    for pattern in patterns:
        assert _table.expand(pattern) == [name for name in expected if name in _table.expand(pattern)]


def test_the_table_prints_itself(of_family: Subjects) -> None:
    text = repr(of_family("neox").lm.sites())
    assert "absent: parallel residual" in text
    assert "layers 0 to 2" in text
    for kind in KINDS.values():
        assert kind.meaning in text or of_family("neox").lm.family.absent(kind.name)


def test_sites_are_listed_in_the_order_of_the_forward_pass(subject: Subject) -> None:
    """Captures come in that order whatever order they are asked in, but for parallel models, whose MLP reads early."""
    names = subject.lm.sites().present()
    run = subject.lm.run([5, 6, 7], capture=list(reversed(names)))
    assert run.sites == tuple(names)
    assert subject.lm.sites()[0].name == "embed"
    assert names[-1] == "logits"
