"""Path patching against plain forwards with hand-written hooks, one a sender and a prompt; identities; refusals."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import false_discovery, sign_flip_p
from cutaway.causal.accuracy import task_accuracy
from cutaway.causal.paths.path_patching import PathGrid, all_senders, path_patch
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.data.tasks.tasks import readable_pairs, task
from cutaway.model.language_model import LanguageModel, attach

Pairs = Callable[..., list[PromptPair]]
SIZE: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
LLAMA = {
    **SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=4),
    "grouped": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=2),
    "parallel": lambda: transformers.GPTNeoXConfig(**LLAMA, use_parallel_residual=True),
    "post-norms": lambda: transformers.Gemma2Config(**LLAMA, num_key_value_heads=2, head_dim=8),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def arch(request: pytest.FixtureRequest) -> tuple[str, LanguageModel]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape) * ("bias" in name or "norm" in name or "ln" in name))
    return request.param, attach(model, name=request.param)


@dataclass
class Hooked:
    """A model run by itself with values set at places: (name, layer, head or None, positions or None, value)."""

    kind: str
    lm: LanguageModel

    def layers(self) -> Any:
        model: Any = self.lm.hf
        return {"gpt2": lambda: model.transformer.h, "parallel": lambda: model.gpt_neox.layers}.get(
            self.kind, lambda: model.model.layers
        )()

    def place(self, name: str, layer: int, head: int | None) -> tuple[Any, bool, slice]:
        """The module, whether its input is meant, and which of its columns."""
        block, h = self.layers()[layer], 8
        every = slice(None)
        output, projections, fused = None, None, every
        part = every if head is None else slice(head * h, head * h + h)
        if name == "start":
            return self.layers()[0], True, every
        if self.kind == "gpt2":
            shift = {"q": 0, "k": 32, "v": 64}.get(name, 0)
            fused = every if head is None else slice(shift + head * h, shift + head * h + h)
            output, projections = block.attn.c_proj, block.attn.c_attn
        if self.kind == "parallel":
            shift = {"q": 0, "k": h, "v": 2 * h}.get(name, 0)
            fused = every if head is None else slice(head * 3 * h + shift, head * 3 * h + shift + h)
            output, projections = block.attention.dense, block.attention.query_key_value
        if self.kind in ("gpt2", "parallel"):
            table = {
                "z": (output, True, part),
                "mlp.in": (block.mlp, True, every),
                "mlp.out": (block.mlp, False, every),
            }
            return table.get(name, (projections, False, fused))
        attention = block.self_attn
        writer = block.post_feedforward_layernorm if self.kind == "post-norms" else block.mlp
        return {
            "z": (attention.o_proj, True, part),
            "mlp.in": (block.mlp, True, every),
            "mlp.out": (writer, False, every),
            "q": (attention.q_proj, False, part),
            "k": (attention.k_proj, False, part),
            "v": (attention.v_proj, False, part),
        }[name]

    def run(
        self, ids: Sequence[int], sets: Sequence[tuple[Any, ...]] = (), keep: Sequence[tuple[str, int]] = ()
    ) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """Logits after the last token, and whole values [p, width] of the places in `keep`, after what is set."""
        handles, kept = [], {}
        jobs = [(name, layer, head, where, value) for name, layer, head, where, value in sets]
        jobs += [(name, layer, None, None, None) for name, layer in keep]
        for name, layer, head, where, value in jobs:
            module, entering, columns = self.place(name, layer, head)

            def change(x: Tensor, name=name, layer=layer, where=where, value=value, columns=columns) -> Tensor:
                if value is None:
                    kept[name, layer] = x[0].detach().clone()
                    return x
                x = x.clone()
                at = list(range(x.shape[1])) if where is None else where
                x[0, at, columns] = value[at][:, columns]
                return x

            def before(_m: Any, args: Any, kwargs: Any, change=change) -> Any:
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

            def after(_m: Any, _a: Any, output: Any, change=change) -> Any:
                return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

            handles.append(
                module.register_forward_pre_hook(before, with_kwargs=True)
                if entering
                else module.register_forward_hook(after)
            )
        try:
            with torch.no_grad():
                return self.lm.hf(input_ids=torch.tensor([list(ids)])).logits[0, -1], kept
        finally:
            for handle in handles:
                handle.remove()


def _place(node: str) -> tuple[str, int, int | None, str | None]:
    """L1H2.q@role -> ("q", 1, 2, "role"), the head or key-value head as the projection has it."""
    plain, _, role = node.partition("@")
    if plain == "embed":
        return "start", 0, None, role or None
    layer, dot, part = plain.removeprefix("L").partition(".")
    for letter in "HK":
        if letter in layer:
            number, head = layer.split(letter)
            return part or "z", int(number), int(head), role or None
    assert dot
    return "mlp", int(layer), None, role or None


def _slow(
    kind: str,
    lm: LanguageModel,
    pairs: AlignedPairs,
    sender: Any,
    receiver: Any,
    mlps: str,
    direction: str,
    known: dict[tuple[int, ...], Any],
) -> list[float]:
    """The path of each pair, from the definition; `known` keeps the plain runs."""
    hooked, found = Hooked(kind, lm), []
    senders, receivers = ([one] if isinstance(one, str) else list(one) for one in (sender, receiver))
    held = [("start", 0), *((part, layer) for layer in range(3) for part in ("z", "mlp.out"))]
    for i in range(len(pairs)):
        clean, corrupt = (tokens.row_ids(i) for tokens in (pairs.clean, pairs.corrupt))
        answer, wrong = int(pairs.answer[i]), int(pairs.wrong[i])

        def metric(logits: Tensor, answer: int = answer, wrong: int = wrong) -> float:
            return (logits[answer] - logits[wrong]).item()

        original, other = (clean, corrupt) if direction == "noise" else (corrupt, clean)
        for ids in (original, other):
            if tuple(ids) not in known:
                known[tuple(ids)] = hooked.run(ids, keep=held)
        (end, old), (new_end, new) = known[tuple(original)], known[tuple(other)]

        side = 0 if direction == "noise" else 1

        def at(role: str | None, side: int = side, i: int = i, n: int = len(original)) -> list[int] | None:
            if role is None:
                return None
            return [int(pairs.places[role][side, i])] if role in pairs.places else [int(role) % n]

        sets: list[tuple[Any, ...]] = [("z", layer, None, None, old["z", layer]) for layer in range(3)]
        if mlps == "freeze":
            sets += [("mlp.out", layer, None, None, old["mlp.out", layer]) for layer in range(3)]
        # a head or MLP before the sender computes what it did, so holding all of them holds those behind it
        for node in senders:
            name, layer, head, role = _place(node)
            name = "mlp.out" if name == "mlp" else name
            sent = new[name, layer].clone()
            if role is not None:
                sent[at(role)] = new[name, layer][at(role, 1 - side)]
            sets.append((name, layer, head, at(role), sent))
        if receivers == ["logits"]:
            patched, _ = hooked.run(original, sets)
        else:
            reads = [
                ("mlp.in" if name == "mlp" else name, layer, head, at(role))
                for name, layer, head, role in map(_place, receivers)
            ]
            _, inputs = hooked.run(original, sets, keep=[(name, layer) for name, layer, _, _ in reads])
            patched, _ = hooked.run(
                original, [(name, layer, head, where, inputs[name, layer]) for name, layer, head, where in reads]
            )
        found.append((metric(patched) - metric(end)) / (metric(new_end) - metric(end)))
    return found


SENDERS: list[Any] = ["embed", "L0H1", "L1H3", "L0.mlp", "L1.mlp", ["L0H0", "L1.mlp"], "L0H1@changed", "L0.mlp@2"]


@pytest.mark.parametrize("mlps", ["recompute", "freeze"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_paths_equal_forwards_with_hooks(
    arch: tuple[str, LanguageModel], id_pairs: Pairs, mlps: Any, direction: Any
) -> None:
    kind, lm = arch
    letter = "K" if lm.n_kv_heads < lm.n_heads else "H"
    receivers: list[Any] = [
        "logits", "L2H1.q", f"L2{letter}1.k", f"L2{letter}0.v", "L2.mlp", ["L2H0.q@-1", f"L2{letter}1.v"],
        ["L2.mlp@changed", "L2H3.q"],
    ]  # fmt: skip
    if direction == "denoise":
        receivers = receivers[::3]
    pairs = aligned(lm, id_pairs(2, None))
    grid = path_patch(lm, pairs, SENDERS, receivers, mlps=mlps, direction=direction, random_senders=1)
    assert not grid.values.isnan().any()
    known: dict[tuple[int, ...], Any] = {}
    for i, sender in enumerate(SENDERS):
        for j, receiver in enumerate(receivers):
            expected = _slow(kind, lm, pairs, sender, receiver, mlps, direction, known)
            assert grid.values[i, j].tolist() == pytest.approx(expected, abs=3e-4), (sender, receiver)
    if kind == "grouped":  # however many rows run together
        small = path_patch(
            lm, pairs, SENDERS, receivers, mlps=mlps, direction=direction, random_senders=1, batch_rows=3
        )
        torch.testing.assert_close(small.values, grid.values, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_a_role_may_stand_elsewhere_in_the_other_prompt(tiny: LanguageModel, direction: Any) -> None:
    pairs = aligned(tiny, [PromptPair((0, 5, 9, 14, 20), (0, 9, 33, 14, 20), 7, 8, {"moved": 2})])
    pairs.places["moved"][:] = torch.tensor([[2], [1]])  # token 9: third in clean, second in corrupt
    paths = [("L0H1@moved", "L1H0.q@moved"), ("embed@moved", "logits"), ("L0.mlp", "L2.mlp@moved")]
    for sender, receiver in paths:
        grid = path_patch(tiny, pairs, [sender], [receiver], direction=direction)
        expected = _slow("llama", tiny, pairs, sender, receiver, "recompute", direction, {})
        assert grid.values[0, 0].tolist() == pytest.approx(expected, abs=3e-4)


@pytest.mark.parametrize("mlps", ["recompute", "freeze"])
def test_sending_everything_gives_the_other_run(arch: tuple[str, LanguageModel], id_pairs: Pairs, mlps: Any) -> None:
    """All that writes to the stream set to the corrupt run is the corrupt run."""
    _, lm = arch
    grid = path_patch(lm, id_pairs(3, 6), [all_senders(lm)], ["logits"], mlps=mlps)
    torch.testing.assert_close(grid.values[0, 0], torch.ones(3), rtol=1e-3, atol=1e-3)


def test_the_direct_path_of_the_embedding_is_algebra(arch: tuple[str, LanguageModel], id_pairs: Pairs) -> None:
    """With all frozen, the unembedding reads the stream plus the difference of the embeddings."""
    _, lm = arch
    pairs = aligned(lm, [PromptPair((0, 5, 9, 14, 20), (0, 5, 9, 14, 33), 3, 30), PromptPair((0, 8), (0, 44), 4, 31)])
    grid = path_patch(lm, pairs, ["embed", "L1.mlp"], ["logits"], mlps="freeze")
    for i in range(2):
        one, two = (
            lm.run([tokens.row_ids(i)], capture=["blocks.0.resid_pre", "blocks.1.mlp.out", "blocks.2.resid_post"])
            for tokens in (pairs.clean, pairs.corrupt)
        )
        ends = [run.last("blocks.2.resid_post") for run in (one, two)]
        for j, site in enumerate(("blocks.0.resid_pre", "blocks.1.mlp.out")):
            streams = [ends[0], ends[1], ends[0] + two.last(site) - one.last(site)]
            logits = [lm.unembed(stream)[0] for stream in streams]
            m = [(z[pairs.answer[i]] - z[pairs.wrong[i]]).item() for z in logits]
            assert grid.values[j, 0, i].item() == pytest.approx((m[0] - m[2]) / (m[0] - m[1]), abs=1e-3)


def test_a_part_of_the_last_layer_has_no_other_path(arch: tuple[str, LanguageModel], id_pairs: Pairs) -> None:
    """From the last MLP to the logits nothing lies between, so both modes agree, and equal patching the node."""
    _, lm = arch
    pairs = aligned(lm, id_pairs(3, 6))
    one, two = (path_patch(lm, pairs, ["L2.mlp"], ["logits"], mlps=mlps) for mlps in ("recompute", "freeze"))
    torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=1e-5)
    from patched import patch_grid

    node = patch_grid(lm, pairs, site="blocks.{l}.mlp.out", direction="noise", layers=[2])
    torch.testing.assert_close(one.values[0, 0], node.values[0, -1], rtol=1e-3, atol=1e-4)


def test_the_control_is_the_other_senders_of_the_kind(tiny: LanguageModel, id_pairs: Pairs) -> None:
    heads = [f"L0H{head}" for head in range(4)]
    grid = path_patch(tiny, id_pairs(9, 6), [*heads, "L0.mlp", ["L0H0", "L0H1"]], ["L1H0.q", "L1.mlp"])
    whole = grid.values[:4].sum(0)
    for i in range(4):
        torch.testing.assert_close(grid.random[i, 0], (whole[0] - grid.values[i, 0]) / 3, rtol=1e-3, atol=1e-4)
    assert grid.n_random[:, 0].tolist() == [3, 3, 3, 3, 5, 5]
    # L0.mlp is the only one, so the five others stand beside it; of six pairs of heads, five are others
    effect = grid.effect("L0H1", "L1.mlp").require_controls()
    assert effect.choices is not None
    assert (effect.choices.granularity, effect.choices.direction) == ("edge", "noise")
    low, high = grid.interval()[:, 1, 1].tolist()
    assert low <= effect.value <= high
    difference = (grid.values[1, 1] - grid.random[1, 1]).double()
    assert grid.p[1, 1].item() == pytest.approx(sign_flip_p(difference.numpy()))
    assert grid.to_json()["q"][1][1] == false_discovery(grid.p.numpy())[1, 1] >= grid.p[1, 1]
    assert grid.effect("L0.mlp", "L1.mlp").controls
    best = grid.strongest("L1.mlp", 2)
    chosen = grid.values[:, 1, 0::2].mean(-1).abs().argmax()
    assert best[0].value == pytest.approx(grid.values[chosen, 1, 1::2].mean().item(), abs=1e-5)
    table = grid.heads("L1H0.q")
    assert table[0, 2].item() == pytest.approx(grid.mean[2, 0].item())
    assert table[1:].isnan().all()
    data = json.loads(json.dumps(grid.to_json(), allow_nan=False))
    assert data["senders"][5] == "L0H0 + L0H1"
    assert "random" in str(grid)
    assert "H3" in grid.heatmap("L1H0.q")


@pytest.mark.parametrize(
    ("senders", "receivers", "says"),
    [
        (["L0H9"], ["logits"], "no source 'L0H9'.*did you mean"),
        (["L0H1"], ["L2H1.z"], "no destination 'L2H1.z'.*did you mean"),
        (["L2H1"], ["L1.mlp"], "L1.mlp does not come after the sender L2H1"),
        (["L1H1"], ["L1H1.q"], "does not come after"),
        (["L1H1"], ["L0.mlp", "L1H2.q"], "none of the receivers comes after"),
        (["L1H1", "L0H1"], ["L2.mlp", "L0H2.q"], "L0H2.q comes after none of the senders"),
        (["L0H1"], ["L2H1.k"], "heads 0 to 1 share their keys and values.*L2K0.k"),
        (["L0H1@subject"], ["logits"], "'subject'; the pairs name changed, last"),
        (["L0H1@9"], ["logits"], "position 9, but some prompts have 7"),
        (["L0H1"], ["logits@last"], "name no position"),
        (["L0H1"], [["logits", "L2.mlp"]], "by themselves"),
        ([["L0H1", "L0H1"]], ["logits"], "twice"),
        ([[]], ["logits"], "no sender"),
        ([], ["logits"], "needs a sender and a receiver"),
    ],
)
def test_bad_paths_say_why(tiny: LanguageModel, id_pairs: Pairs, senders: Any, receivers: Any, says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        path_patch(tiny, id_pairs(2, 6), senders, receivers)


def test_bad_requests(tiny: LanguageModel, id_pairs: Pairs) -> None:
    pairs = id_pairs(2, 6)
    with pytest.raises(CutawayError, match="senders is the text 'embed'; give a list of names"):
        path_patch(tiny, pairs, "embed", ["logits"])
    with pytest.raises(CutawayError, match="3 is no node"):
        path_patch(tiny, pairs, [3], ["logits"])  # type: ignore[list-item]
    for options, says in (
        ({"mlps": "thaw"}, "recompute"),
        ({"direction": "up"}, "denoise"),
        ({"metric": "accuracy"}, "no metric"),
        ({"metric": lambda logits, _: torch.zeros(len(logits))}, "does not tell"),
    ):
        with pytest.raises(CutawayError, match=says):
            path_patch(tiny, pairs, ["L0H1"], ["logits"], **options)  # type: ignore[arg-type]
    grid = path_patch(tiny, pairs, ["L0H1", "L1H0"], ["L1H1.q", "logits"])
    assert grid.values[1, 0].isnan().all()
    with pytest.raises(CutawayError, match="is no path"):
        grid.effect("L1H0", "L1H1.q")
    with pytest.raises(CutawayError, match="has no path"):
        grid.effect("L1H0", "L2.mlp")
    with pytest.raises(CutawayError, match="too few"):
        grid.strongest("logits")


def test_a_parallel_layer_has_no_path_from_its_heads_to_its_mlp(
    arch: tuple[str, LanguageModel], id_pairs: Pairs
) -> None:
    kind, lm = arch
    pairs = id_pairs(2, 6)
    if kind == "parallel":
        with pytest.raises(CutawayError, match="does not come after"):
            path_patch(lm, pairs, ["L1H0"], ["L1.mlp"])
    else:
        grid: PathGrid = path_patch(lm, pairs, ["L1H0"], ["L1.mlp"])
        expected = _slow(kind, lm, aligned(lm, pairs), "L1H0", "L1.mlp", "recompute", "noise", {})
        assert grid.values[0, 0].tolist() == pytest.approx(expected, abs=3e-4)


def test_atlas_reads_the_acting_name_where_it_stands(atlas: LanguageModel) -> None:
    """Three heads write the answer of IOI, told by their values at the second mention and not by their queries."""
    drawn = readable_pairs(atlas, task("indirect object"), 48, split="held_out")
    pairs = drawn[task_accuracy(atlas, drawn).items.nonzero()[:10, 0].tolist()]
    heads = [f"{head}@last" for head in all_senders(atlas, mlps=False, embed=False)]
    direct = path_patch(atlas, pairs, heads, ["logits"], mlps="freeze")
    movers = [effect.require_controls().name.split("@")[0] for effect in direct.strongest("logits", 3)]
    assert set(movers) == {"L6H5", "L6H6", "L7H0"}
    assert all(effect.value > effect.controls[0].value + 0.03 for effect in direct.strongest("logits", 2))
    before = all_senders(atlas)[: 1 + 6 * 9]
    told = path_patch(atlas, pairs, [before], [[f"{head}.{part}" for head in movers] for part in ("q@last", "v@S2")])
    assert told.mean[0, 0].abs() < 0.05
    assert told.mean[0, 1] > 0.5
