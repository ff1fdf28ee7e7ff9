"""Shares against what taking a part out of the stream does, with every norm frozen, written out in float64."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import FAMILIES, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.architecture.norms import Norm
from cutaway.model.language_model import LanguageModel, attach
from cutaway.observe.attribution import parts as attribution_parts
from cutaway.observe.attribution.ablation import ablate_parts
from cutaway.observe.attribution.attribution import attribute
from cutaway.observe.attribution.parts import GRANULARITIES, By, dla_sum_errors
from cutaway.observe.attribution.results import Attribution

ROWS = [[0, 5, 17, 33, 4, 60], [0, 9, 8, 7]]
ANSWER, WRONG = [11, 12], [[40], [41]]
DALLAS = "The capital of the state containing Dallas is"


@pytest.fixture(scope="module", params=list(FAMILIES))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@pytest.fixture(scope="module")
def gemma2() -> LanguageModel:
    return build("gemma2")


def normed(norm: Any, x: Tensor, scale: Tensor, *, bias: bool = True) -> Tensor:
    """A norm with its divisor given, in float64: from the class's name and the parameters alone."""
    x = x.double()
    if "LayerNorm" in type(norm).__name__:
        x = x - x.mean(-1, keepdim=True)
    y = x / scale.double() * (norm.weight.double() + (1.0 if "Gemma" in type(norm).__name__ else 0.0))
    return y + norm.bias.double() if bias and getattr(norm, "bias", None) is not None else y


LOGITS_TIMES, WRITES_TIMES = {"cohere": 0.3, "granite": 1 / 3.0}, {"granite": 0.4}


class Frozen:
    """The last position's logit difference as a function of the stream, all norms frozen, by forward equations."""

    def __init__(self, lm: LanguageModel, row: int) -> None:
        self.lm, self.row = lm, row
        self.run = lm.run(ROWS, capture=[site.name for site in lm.sites() if site.absent is None])
        self.at = len(ROWS[row]) - 1
        base: Any = getattr(lm.hf.base_model, "decoder", lm.hf.base_model)
        names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
        self.final = next(getattr(base, name) for name in names if hasattr(base, name))
        self.layers = base.h if hasattr(base, "h") else base.layers

    def site(self, name: str) -> Tensor:
        return self.run[name][self.row, self.at].double()

    def difference(self, stream: Tensor) -> float:
        y = normed(self.final, stream, self.site("ln_final.scale"))
        head = self.lm.hf.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        logits = y @ head.weight.double().T * LOGITS_TIMES.get(self.lm.name, 1.0)
        return float((logits[ANSWER[self.row]] - logits[WRONG[self.row][0]]).detach())

    def without(self, written: Tensor) -> float:
        stream = self.site(f"blocks.{self.lm.n_layers - 1}.resid_post")
        return self.difference(stream) - self.difference(stream - written)

    def through(self, layer: int, kind: str, raw: Tensor) -> Tensor:
        """What a piece of a module's output adds to the stream: the post-norm, if any, with its divisor frozen."""
        raw = raw * WRITES_TIMES.get(self.lm.name, 1.0)
        name = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}[kind]
        if not hasattr(self.layers[layer], "post_feedforward_layernorm"):
            return raw
        norm = getattr(self.layers[layer], name)
        return normed(norm, raw, self.site(f"blocks.{layer}.{kind}.scale"), bias=False)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_the_parts_sum_to_the_logit_difference(lm: LanguageModel, by: By) -> None:
    if by == "neuron" and lm.name == "mixtral":
        return  # it has none: below
    result = attribute(lm, ROWS, ANSWER, WRONG, by=by, controls=2)
    logits = lm.run(ROWS, capture="logits_precap" if result.softcap else None).logits
    assert logits is not None
    if result.softcap:
        capped = torch.stack([logits[0, 5, 11] - logits[0, 5, 40], logits[1, 3, 12] - logits[1, 3, 41]])
        torch.testing.assert_close(result.total_capped, capped.double())
        logits = lm.run(ROWS, capture="logits_precap")["logits_precap"]
    expected = torch.stack([logits[0, 5, 11] - logits[0, 5, 40], logits[1, 3, 12] - logits[1, 3, 41]]).double()
    torch.testing.assert_close(result.total, expected, rtol=1e-6, atol=1e-6)
    scale = float(result.values.abs().max())
    assert float((result.values.sum(1) - expected).abs().max()) < 1e-5 * scale
    assert result.relative_error < 1e-5


@pytest.mark.parametrize("row", [0, 1])
def test_each_share_is_what_taking_the_part_out_of_the_stream_changes(lm: LanguageModel, row: int) -> None:
    """In float64, forward, part by part; rows of a batch with padding."""
    frozen = Frozen(lm, row)
    expected = {"embedding": frozen.without(frozen.site("embed"))}
    if "pos_embed" in frozen.run:
        expected["positions"] = frozen.without(frozen.site("pos_embed"))
    heads: dict[str, float] = {}
    for layer in range(lm.n_layers):
        expected[f"L{layer} attention"] = frozen.without(frozen.site(f"blocks.{layer}.attn.out"))
        expected[f"L{layer} MLP"] = frozen.without(frozen.site(f"blocks.{layer}.mlp.out"))
        for head in range(lm.n_heads):
            raw = frozen.site(f"blocks.{layer}.attn.result")[head]
            heads[f"L{layer}H{head}"] = frozen.without(frozen.through(layer, "ln1_post", raw))
    found = shares(attribute(lm, ROWS, ANSWER, WRONG, controls=1), row)
    assert found == pytest.approx(expected | {k: v for k, v in found.items() if "biases" in k}, abs=2e-5, rel=1e-5)
    found = shares(attribute(lm, ROWS, ANSWER, WRONG, by="head", controls=1), row)
    assert {k: found[k] for k in heads} == pytest.approx(heads, abs=2e-5, rel=1e-5)


def test_each_neuron_is_its_row_of_the_output_weights(lm: LanguageModel) -> None:
    if lm.name == "mixtral":
        with pytest.raises(CutawayError, match="cannot be attributed by neuron"):
            attribute(lm, ROWS, ANSWER, WRONG, by="neuron")
        return
    frozen = Frozen(lm, 0)
    result = attribute(lm, ROWS, ANSWER, WRONG, by="neuron", controls=1)
    found = shares(result, 0)
    for layer, neuron in ((0, 3), (1, 17), (2, 39)):
        mlp: Any = getattr(frozen.layers[layer], "mlp", frozen.layers[layer])
        out = next(getattr(mlp, n) for n in ("c_proj", "down_proj", "dense_4h_to_h", "fc2") if hasattr(mlp, n))
        weight = out.weight if type(out).__name__ == "Conv1D" else out.weight.T
        raw = frozen.site(f"blocks.{layer}.mlp.post")[neuron] * weight[neuron].double()
        expected = frozen.without(frozen.through(layer, "ln2_post", raw))
        assert found[f"L{layer} neuron {neuron}"] == pytest.approx(expected, abs=2e-5, rel=1e-5)


def test_a_heads_sources_are_its_pattern_times_values(lm: LanguageModel) -> None:
    """Each is one source's value through W_O; together they are the head, and none comes from padding."""
    heads = attribute(lm, ROWS, ANSWER, WRONG, by="head", controls=1)
    result = attribute(lm, ROWS, ANSWER, WRONG, by="source", controls=1)
    width = len(ROWS[0])
    for layer in range(lm.n_layers):
        by_head = next(g.values[:, 0] for g in heads.groups if g.kind == "head" and g.layer == layer)
        sources = next(g.values[:, 0] for g in result.groups if g.kind == "source" and g.layer == layer)
        sources = sources.unflatten(1, (lm.n_heads, width))
        torch.testing.assert_close(sources.sum(2), by_head, rtol=1e-5, atol=1e-5)
        assert sources[1, :, len(ROWS[1]) :].abs().max() == 0
    frozen, layer, head, source = Frozen(lm, 0), 1, 2, 3
    weight = float(frozen.run[f"blocks.{layer}.attn.pattern"][0, head, frozen.at, source])
    value = frozen.run[f"blocks.{layer}.attn.v"][0, source, head // (lm.n_heads // lm.n_kv_heads)].double()
    raw = weight * value @ lm.w_o(layer)[head].double()
    name = f"L{layer}H{head} ← position {source}"
    expected = frozen.without(frozen.through(layer, "ln1_post", raw))
    assert shares(result, 0)[name] == pytest.approx(expected, abs=2e-5, rel=1e-5)
    assert result.by_source().shape == (2, width)


def shares(result: Attribution, row: int) -> dict[str, float]:
    return dict(zip(result.names, result.values[row].tolist(), strict=True))


def test_the_sum_error_says_when_a_gain_is_wrong(gemma2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's gain is 1 + w: with w alone every granularity misses the sum, and `attribute` refuses."""
    errors = dla_sum_errors(gemma2)
    assert errors.keys() == set(GRANULARITIES)
    assert max(errors.values()) < 1e-5
    sound = Norm.pull
    monkeypatch.setattr(Norm, "pull", lambda norm, g: sound(norm, g) - g)
    assert min(dla_sum_errors(gemma2).values()) > 1e-2
    with pytest.raises(CutawayError, match="miss its logit difference"):
        attribute(gemma2, ROWS, ANSWER, WRONG)


def test_what_a_share_is_compared_with(gemma2: LanguageModel) -> None:
    logits = gemma2.run(ROWS[0], capture="logits_precap")["logits_precap"][0, -1].double()
    alone = attribute(gemma2, ROWS[0], 11, controls=1)
    several = attribute(gemma2, ROWS[0], 11, [40, 41], controls=1)
    mean = attribute(gemma2, ROWS[0], 11, "mean", controls=1)
    assert alone.total.item() == pytest.approx(logits[11].item())
    assert several.total.item() == pytest.approx((logits[11] - logits[[40, 41]].mean()).item())
    assert mean.total.item() == pytest.approx((logits[11] - logits.mean()).item())
    assert several.wrong == ("the mean of '#40', '#41'",)
    for result in (alone, several, mean):
        assert result.relative_error < 1e-5
        assert abs(float(result.total_capped)) < 2 * 3.0, "a softcap of 3 bounds both logits"
    assert "before its softcap" in str(alone)
    assert "after its softcap of 3" in str(alone)


def test_a_position_in_the_middle(lm: LanguageModel) -> None:
    """Causal: what follows the position changes nothing."""
    inside = attribute(lm, ROWS, ANSWER, WRONG, position=[3, 1], by="head", controls=2)
    alone = attribute(lm, [ROWS[0][:4], ROWS[1][:2]], ANSWER, WRONG, by="head", controls=2)
    torch.testing.assert_close(inside.values, alone.values, rtol=1e-4, atol=1e-4)
    assert inside.position == (3, 1)


def test_controls_are_random_pairs_with_a_direction_as_long(gemma2: LanguageModel) -> None:
    directions, _ = attribution_parts.difference_directions(gemma2, ANSWER, [[40], [41]], 5, 0)
    lengths = directions.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))
    result = attribute(gemma2, ROWS, ANSWER, WRONG, controls=5)
    part = result.top(1)[0]
    group, index = result.locate(result.ranked()[0])
    random = group.values[:, 1:, index].mean(0).abs()
    assert part.control == pytest.approx(float(random.mean()))
    assert part.control_range[0] <= part.control <= part.control_range[1]
    effect = result.effect(part).require_controls()
    assert (effect.n, effect.value, effect.controls[0].n) == (2, part.value, 5)
    assert attribute(gemma2, ROWS, ANSWER, WRONG, controls=5).to_json() == result.to_json(), "the seed decides"


def test_ablating_parts_is_measured_by_hand_written_edits(gemma2: LanguageModel) -> None:
    result = attribute(gemma2, ROWS, ANSWER, WRONG, by="head", controls=1)
    ablated = ablate_parts(gemma2, result, 3)
    assert len(ablated) == 3
    run = gemma2.run(ROWS, capture=["blocks.*.attn.z", "blocks.*.mlp.out", "embed"])
    keep = run.tokens.mask.clone()
    keep[:, 0] = False
    seen = set()
    for one in ablated:
        part = one.part
        seen.add(part.kind)
        site = {"head": "blocks.{}.attn.z", "MLP": "blocks.{}.mlp.out", "embedding": "embed"}[part.kind]
        site = site.format(part.layer)
        mean = run[site][keep].mean(0)
        heads = [part.index] if part.kind == "head" else None
        edit = cutaway.mean(site, mean[heads] if heads else mean, positions=-1, heads=heads)
        logits = gemma2.run(ROWS, edits=edit, capture="logits_precap")["logits_precap"].double()
        after = torch.stack([logits[0, 5, 11] - logits[0, 5, 40], logits[1, 3, 12] - logits[1, 3, 41]])
        assert one.effect.value == pytest.approx(float((result.total - after).mean()), abs=1e-5)
        assert one.effect.n == 2
        assert one.effect.controls
    with pytest.raises(CutawayError, match="by source has no ablation"):
        ablate_parts(gemma2, attribute(gemma2, ROWS, ANSWER, WRONG, by="source", controls=1))


def test_ablating_a_neuron_leaves_the_others(gemma2: LanguageModel) -> None:
    result = attribute(gemma2, ROWS, ANSWER, WRONG, by="neuron", controls=1)
    neuron = next(a for a in ablate_parts(gemma2, result, 12) if a.part.kind == "neuron")
    site = f"blocks.{neuron.part.layer}.mlp.post"
    run = gemma2.run(ROWS, capture=site)
    keep = run.tokens.mask.clone()
    keep[:, 0] = False
    value = run[site].clone()
    value[:, :, neuron.part.index] = run[site][keep].mean(0)[neuron.part.index]
    edit = cutaway.set(site, torch.stack([value[0, 5], value[1, 3]])[:, None], positions=[[5], [3]])
    logits = gemma2.run(ROWS, edits=edit, capture="logits_precap")["logits_precap"].double()
    after = torch.stack([logits[0, 5, 11] - logits[0, 5, 40], logits[1, 3, 12] - logits[1, 3, 41]])
    assert neuron.effect.value == pytest.approx(float((result.total - after).mean()), abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_biases_on_the_disk_are_fetched(family: str, tmp_path: Path) -> None:
    """Of the output projections (gpt2) and of the unembedding (phi)."""
    sizes: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        places: dict[str, Any] = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f"), "cpu")
        places |= {"transformer.h.0": "cpu", "transformer.h.1": "disk", "lm_head": "cpu"}
        owners = [part for block in model.transformer.h for part in (block.attn.c_proj, block.mlp.c_proj)]
    else:
        config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = PhiForCausalLM(PhiConfig(**sizes, **config, max_position_embeddings=64))  # type: ignore[arg-type]
        names = ("model.embed_tokens", "model.layers", "model.final_layernorm", "model.rotary_emb")
        places = dict.fromkeys(names, "cpu") | {"lm_head": "disk"}
        owners = [model.lm_head]
    for owner in owners:  # they begin as zeros
        torch.nn.init.normal_(owner.bias)
    model.save_pretrained(tmp_path)
    whole = cutaway.load(tmp_path)
    placed = cutaway.load(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    for by in GRANULARITIES:
        right, got = (attribute(lm, [[0, 5, 17, 33, 4, 50]], 10, 11, by=by) for lm in (whole, placed))
        assert got.names == right.names
        torch.testing.assert_close(got.values, right.values)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("target", "by"), [("o_proj", "head"), ("down_proj", "neuron"), ("lm_head", "component")])
def test_the_bias_of_an_adapter_is_a_part(target: str, by: By) -> None:
    """Against PEFT's merging, which there is where the model has a bias; `attribute` itself refuses a wrong sum."""
    for name in ("llama", "llama with biases"):
        options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target], init_lora_weights=False, lora_bias=True)
        model: Any = peft.get_peft_model(build(name).hf, options).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        got = attribute(attach(model), ROWS, ANSWER, WRONG, by=by)
        if target == "lm_head":
            bias = 2 * model.get_base_model().lm_head.lora_B["default"].bias.detach().double()
            right = bias[ANSWER] - bias[[wrong for (wrong,) in WRONG]]
            torch.testing.assert_close(got.values[:, got.names.index("final biases")], right)
        elif name != "llama":
            right = attribute(attach(model.merge_and_unload()), ROWS, ANSWER, WRONG, by=by)
            assert got.names == right.names
            torch.testing.assert_close(got.values, right.values, rtol=1e-4, atol=1e-4)


def test_bad_input_is_one_sentence(gemma2: LanguageModel, tiny_words: LanguageModel) -> None:
    for inputs, answer, wrong, options, says in [
        (ROWS, [1], None, {}, "1 answers for 2 prompts"),
        (ROWS, 99, None, {}, "99 is no token id"),
        (ROWS, "w3", None, {}, "no tokenizer"),
        (ROWS[0], 3, [], {}, "list of wrong answers is empty"),
        (ROWS, 3, [1, 2, 3], {}, "3 wrong answers for 2 prompts"),
        (ROWS, 3, None, {"position": 4}, "Position 4 is outside row 1"),
        (ROWS, 3, None, {"position": [1]}, "1 positions for 2 prompts"),
        (ROWS, 3, None, {"by": "layer"}, "by='layer' is not one of"),
        (ROWS, 3, None, {"controls": 0}, "at least one random token pair"),
    ]:
        with pytest.raises(CutawayError, match=says):
            attribute(gemma2, inputs, answer, wrong, **options)
    for text, says in [
        ("", "is empty"),
        ("zebra", "'zebra' is unknown to the tokenizer of tiny"),
        ("w3 w4", r"is 2 tokens of tiny: 'w3' \(3\), 'w4' \(4\)"),
    ]:
        with pytest.raises(CutawayError, match=says):
            attribute(tiny_words, "w5 w6", text)
    assert attribute(tiny_words, "w5 w6", "w3", controls=1).answers == ("w3",)


@pytest.fixture
def tiny_words() -> LanguageModel:
    lm = build("llama")
    plain = Tokenizer(WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    plain.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return attach(lm.hf, PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0"), name="tiny")


def test_logits_that_are_no_numbers_are_refused() -> None:
    lm = build("llama")
    with torch.no_grad():
        lm.hf.get_output_embeddings().weight[11] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(CutawayError, match="NaN"):
        attribute(lm, ROWS, ANSWER, WRONG)


def test_on_atlas_the_state_and_the_city_bring_the_answer() -> None:
    """Two-hop recall on the shipped model, its difference in a table that says what it is not."""
    atlas = cutaway.load("atlas")
    result = attribute(atlas, DALLAS, " Austin", " Sacramento", by="source")
    assert result.relative_error < 1e-5
    sources = result.by_source()[0]
    dallas = result.tokens.find(0, " Dallas")
    assert int(sources.argmax()) == dallas
    assert "not what the answer would lose" in str(result)
    data = attribute(atlas, DALLAS, " Austin", " Sacramento").to_json(top=3)
    assert data["n_parts"] == 17
    assert len(data["parts"]) == 3
    assert data["rest"] == pytest.approx(data["total"][0] - sum(p["value"] for p in data["parts"]), abs=1e-4)


@pytest.mark.parametrize("by", GRANULARITIES)
def test_shares_are_linear_in_what_is_compared(gemma2: LanguageModel, by: By) -> None:
    def values(answer: int, wrong: Any) -> Tensor:
        return attribute(gemma2, ROWS[0], answer, wrong, by=by, controls=1).values

    torch.testing.assert_close(values(11, 40), -values(40, 11))
    torch.testing.assert_close(values(11, [40, 41]), (values(11, 40) + values(11, 41)) / 2)
    torch.testing.assert_close(values(11, 40), values(11, None) - values(40, None))


@pytest.mark.parametrize("name", ["stories260K", "webtext-gpt2"])
def test_real_models_sum(shared: Path, name: str) -> None:
    lm = cutaway.load(shared / "models" / name)
    assert dla_sum_errors(lm).keys() == set(GRANULARITIES)
    assert max(dla_sum_errors(lm).values()) < 1e-5
