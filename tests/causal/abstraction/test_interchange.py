"""Interchange interventions against hand-written hooks and against a model that is its own causal model; refusals."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from result_checks import check_result

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.abstraction.causal_model import CausalModel, Example, Swap, Variable
from cutaway.causal.abstraction.interchange import interchange, interchange_grid
from cutaway.causal.abstraction.outcomes import Place
from cutaway.model.edits.edits import patch
from cutaway.model.language_model import LanguageModel

FIRST, SECOND = ("w5", "w9", "w33", "w12"), ("w20", "w41", "w7")


def _prompt(first: str, second: str) -> str:
    return f"w14 {first} w8 {second} w3"


@pytest.fixture(scope="module")
def itself(words: LanguageModel) -> CausalModel:
    """The causal model that answers as the network does, with its first changing word as a variable."""
    says = {}
    for first, second in itertools.product(FIRST, SECOND):
        logits = words.run([_prompt(first, second)], logits="last").logits
        assert logits is not None
        says[first, second] = words.token_strings([int(logits[0, 0].argmax())])[0]
    return CausalModel(
        ("first", "second"),
        {
            "word": Variable(("first",), lambda first: first),
            "answer": Variable(("word", "second"), lambda word, second: says[word, second]),
        },
        "answer",
    )


def _example(first: str, second: str) -> Example:
    return Example(_prompt(first, second), {"first": first, "second": second}, {"word": f" {first} w8", "there": first})


def _swaps() -> list[Swap]:
    items = [_example(first, second) for first, second in itertools.product(FIRST, SECOND)]
    return [(a, b) for a in items for b in items if a is not b]


def _hooked(lm: LanguageModel, base: str, source: str, layer: int, to: int, of: int) -> int:
    """The answer after the base with one state of a layer's output taken from the source, by plain hooks."""
    model: Any = lm.hf
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0, of].clone())

    def put(_: Any, __: Any, output: Any) -> Any:
        tensor = (output[0] if isinstance(output, tuple) else output).clone()
        tensor[0, to] = seen[0]
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    for prompt, hook in ((source, keep), (base, put)):
        handle = model.model.layers[layer].register_forward_hook(hook)
        try:
            with torch.no_grad():
                logits = model(input_ids=lm.tokens([prompt]).ids).logits
        finally:
            handle.remove()
    return int(logits[0, -1].argmax())


def test_a_causal_model_runs_forwards_and_with_variables_set() -> None:
    model = CausalModel(
        ("a", "b"),
        {
            "sum": Variable(("a", "b"), lambda a, b: a + b),
            "twice": Variable(("sum",), lambda x: 2 * x),
            "text": Variable(("twice", "a"), lambda t, a: f" {t}-{a}"),
        },
        "text",
    )
    assert model.run({"a": 1, "b": 2})["text"] == " 6-1"
    assert model.run({"a": 1, "b": 2}, {"sum": 5})["text"] == " 10-1"
    assert model.run({"a": 1, "b": 2}, {"twice": 7}) == {"a": 1, "b": 2, "sum": 3, "twice": 7, "text": " 7-1"}
    with pytest.raises(CutawayError, match="needs the input 'b'"):
        model.run({"a": 1})
    with pytest.raises(CutawayError, match="depends on 'c'"):
        CausalModel(("a",), {"x": Variable(("c",), str)}, "x")
    with pytest.raises(CutawayError, match="no variable"):
        CausalModel(("a",), {"x": Variable(("a",), str)}, "y")


def test_results_print_table_draw_and_save_themselves(
    words: LanguageModel, itself: CausalModel, tmp_path: Path
) -> None:
    swaps = _swaps()[:20]
    for name in ("grid", "one"):
        (tmp_path / name).mkdir()
    check_result(interchange_grid(words, itself, "word", swaps, roles=["there", "last"]), tmp_path / "grid")
    place = Place("blocks.0.resid_pre", "there", neurons=(1, 2))
    check_result(interchange(words, itself, {"word": [place]}, swaps, draws=2), tmp_path / "one")


def test_every_cell_equals_hooks(words: LanguageModel, itself: CausalModel) -> None:
    swaps = _swaps()
    grid = interchange_grid(words, itself, "word", swaps, roles=["there", "last"])
    counted = [
        (base, source)
        for base, source in swaps
        if itself.run(base.inputs, {"word": source.inputs["first"]})["answer"] != itself.run(base.inputs)["answer"]
    ]
    assert grid.n == len(counted) > 10
    for row, (base, source) in enumerate(counted):
        wanted = itself.run(base.inputs, {"word": source.inputs["first"]})["answer"]
        places = [
            words.tokens([base.prompt]).find(0, base.inputs["first"]),
            len(words.tokens([base.prompt]).ids[0]) - 1,
        ]
        for layer in range(3):
            for j, at in enumerate(places):
                answer = _hooked(words, base.prompt, source.prompt, layer, at, at)
                follows = words.token_strings([answer])[0] == wanted
                assert bool(grid.follows[layer, j, row]) == follows
    data = json.loads(json.dumps(grid.to_json()))
    assert data["iia"][0][0] == pytest.approx(grid.iia[0, 0].item())
    assert "L2" in str(grid)


def test_the_word_itself_is_the_variable(words: LanguageModel, itself: CausalModel) -> None:
    """Swapping the embedding is swapping the word, so the network does what the causal model says, always."""
    found = interchange(words, itself, {"word": [Place("blocks.0.resid_pre", "there")]}, _swaps())
    assert found.iia == 1.0
    right, n = found.left_alone
    assert right == n > 0
    effect = found.effect().require_controls()
    names = [control.name for control in effect.controls]
    assert names == ["random other position", "source with another value", "the same place in the farthest layer"]
    assert all(control.value < 0.6 for control in effect.controls)
    assert effect.interval is not None
    assert effect.interval[1] == 1.0
    assert effect.choices is not None
    assert (effect.choices.granularity, effect.choices.ablation) == ("node", "interchange")
    grid = interchange_grid(words, itself, "word", _swaps(), site="blocks.{l}.resid_pre", roles=["there", "last"])
    assert grid.place() == Place("blocks.0.resid_pre", "there")
    assert grid.place(roles=["last"]).role == "last"


def test_a_whole_basis_is_the_whole_place_and_a_part_has_a_random_part_beside_it(
    words: LanguageModel, itself: CausalModel
) -> None:
    swaps = _swaps()
    whole = interchange(words, itself, {"word": [Place("blocks.1.resid_pre", "there")]}, swaps)
    basis = Place("blocks.1.resid_pre", "there", basis=torch.eye(32))
    same = interchange(words, itself, {"word": [basis]}, swaps)
    assert torch.equal(whole.follows, same.follows)
    assert same.effect().controls[-1].name == "random part of the same size"
    nothing = Place("blocks.0.resid_pre", "there", neurons=(3,))
    little = interchange(words, itself, {"word": [nothing]}, swaps, draws=2)
    assert little.iia < 0.5
    assert little.random is not None
    assert little.random.shape == (2, len(swaps))
    heads = [Place("blocks.0.attn.z", "last", heads=(0, 1, 2, 3)), Place("blocks.0.mlp.out", "last")]
    both = interchange(words, itself, {"word": heads}, swaps, draws=1)
    assert "blocks.0.attn.z (heads [0, 1, 2, 3]) at last and blocks.0.mlp.out at last" in both.effect().name
    assert "left alone" in str(both)
    json.dumps(both.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("site", "part", "size"),
    [
        ("blocks.1.attn.z", {"heads": (0, 1)}, 4),
        ("blocks.1.attn.z", {"heads": (0, 1, 3)}, 4),  # one head is left beside them
        ("blocks.1.mlp.post", {"neurons": tuple(range(20))}, 48),
        ("blocks.1.mlp.post", {"neurons": tuple(range(30))}, 48),
    ],
)
def test_the_random_part_is_another_part(
    words: LanguageModel,
    itself: CausalModel,
    monkeypatch: pytest.MonkeyPatch,
    site: str,
    part: dict[str, tuple[int, ...]],
    size: int,
) -> None:
    """It shares no head or neuron with the part that is named, or no more than it must."""
    seen: list[tuple[int, ...]] = []
    (kind, named), draws = next(iter(part.items())), 4

    def spied(at: str, run: Any, **where: Any) -> Any:
        seen.append(where[kind])
        return patch(at, run, **where)

    monkeypatch.setattr("cutaway.causal.abstraction.interchange.patch", spied)
    place = Place(site, "last", heads=part.get("heads"), neurons=part.get("neurons"))
    interchange(words, itself, {"word": [place]}, _swaps()[:6], draws=draws)
    assert seen[-1] == named
    for drawn in seen[-1 - draws : -1]:
        assert len(set(drawn)) == len(named)
        assert set(drawn) <= set(range(size))
        assert len(set(drawn) & set(named)) == max(0, 2 * len(named) - size)


def test_wrong_answers_are_left_out_with_the_reason(words: LanguageModel, itself: CausalModel) -> None:
    right, other = _example("w5", "w20"), _example("w9", "w20")
    wrong = Example(_prompt("w5", "w41"), {"first": "w33", "second": "w7"}, right.positions)
    answers = [itself.run(one.inputs)["answer"] for one in (right, other, wrong)]
    assert len(set(answers)) > 1
    found = interchange(words, itself, {"word": [Place("embed", "there")]}, [(right, other), (right, wrong)])
    assert [reason for _, reason in found.refused] == ["words does not answer the source rightly"]
    with pytest.raises(CutawayError, match="none of the 1 pairs can be used: words does not answer the source rightly"):
        interchange_grid(words, itself, "word", [(right, wrong)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alignment": {}}, "names no place"),
        ({"alignment": {"word": []}}, "names no place"),
        ({"alignment": {"word": ["embed"]}}, "names what is no Place"),
        ({"alignment": {"verb": [Place("embed", "there")]}}, "no variable 'verb'; it has word, answer"),
        ({"alignment": {"word": [Place("embed", "here")]}}, "no position 'here'; it names word, there, last"),
        ({"alignment": {"word": [Place("blocks.9.resid_post", "last")]}}, "blocks.9"),
        ({"swaps": []}, "none was given"),
    ],
)
def test_bad_requests_say_why(words: LanguageModel, itself: CausalModel, change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"alignment": {"word": [Place("embed", "there")]}, "swaps": _swaps(), **change}
    with pytest.raises(CutawayError, match=says):
        interchange(words, itself, given["alignment"], given["swaps"])


def test_more_bad_requests(words: LanguageModel, itself: CausalModel) -> None:
    with pytest.raises(CutawayError, match="draws is -1; give 0 or more"):
        interchange(words, itself, {"word": [Place("embed", "there")]}, _swaps(), draws=-1)
    with pytest.raises(CutawayError, match="names no layer"):
        interchange_grid(words, itself, "word", _swaps(), site="embed")
    same = [(_example("w5", "w20"), _example("w5", "w41"))]
    with pytest.raises(CutawayError, match="no pair's answer changes"):
        interchange_grid(words, itself, "word", same)
    numbers = CausalModel(("first",), {"answer": Variable(("first",), len)}, "answer")
    with pytest.raises(CutawayError, match="must be a text"):
        interchange_grid(words, numbers, "answer", _swaps())
    far = Example(_prompt("w5", "w7"), {"first": "w5", "second": "w7"}, {"there": 40})
    with pytest.raises(CutawayError, match="is not at 40"):
        interchange_grid(words, itself, "word", [(far, _example("w33", "w7"))], roles=["there"])


def test_the_bridge_of_atlas_is_the_state_at_the_last_token(atlas: LanguageModel) -> None:
    """Located on cities met in two-hop sentences, confirmed on others, from prompts that ask for something else."""
    import atlas_bridge as bridge

    seen = bridge.swaps(atlas, False, 40, lambda city: bridge.asked(city, "abbreviation"))
    grid = interchange_grid(atlas, bridge.BRIDGE, "state", seen, roles=("city", "last"))
    place = grid.place(roles=("last",))
    assert place.site in {f"blocks.{layer}.resid_post" for layer in (2, 3, 4)}
    assert grid.iia[0, 0] > 0.9  # the city is handed over in L0 and L1 ...
    assert grid.iia[3, 0] < 0.2
    assert grid.iia[3, 1] > 0.7  # ... and its state waits at the last token
    assert grid.iia[7, 1] < 0.1  # where at last the source's own answer stands, which is none here
    for source in (lambda city: bridge.asked(city, "abbreviation"), bridge.named):
        found = interchange(atlas, bridge.BRIDGE, {"state": [place]}, bridge.swaps(atlas, True, 40, source, seed=1))
        effect = found.effect().require_controls()
        assert effect.interval is not None
        assert effect.interval[0] > 0.3
        assert all(control.interval is not None and control.interval[1] < 0.2 for control in effect.controls)
        right, same = found.left_alone
        assert right == same == 4
