"""Where activations come from: the sites of one forward, rules, stores, two models; and the trackers."""

import itertools
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.harvesting.activations import counted
from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.settings import Rules, Storage
from cutaway.dictionaries import load, train
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.training.sources import LiveRows, StoreSource
from cutaway.model.language_model import LanguageModel, attach

STREAM, HEADS, MLP = "blocks.1.resid_post", "blocks.0.attn.z", "blocks.2.mlp.in"
SMALL: dict[str, Any] = {"d_sae": 64, "k": 4, "tokens": 1280, "batch": 64, "sample": 64, "calibrate": 128}


@pytest.fixture(scope="module")
def rows() -> Tensor:
    rows = torch.randint(2, 61, (60, 12), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 0
    rows[::5, 6] = 0
    return rows


@pytest.fixture(scope="module")
def other(tiny: LanguageModel) -> LanguageModel:
    """The same model with other weights, as after a fine-tuning."""
    import copy

    model = copy.deepcopy(tiny.hf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return attach(model, tiny.tokenizer, name="tuned")


def some(source: Any, n: int, size: int = 32, start: int = 0) -> list[Mapping[str, Tensor]]:
    return list(itertools.islice(source.batches(size, start), n))


def test_all_sites_are_those_of_hooks_by_one_forward(
    tiny: LanguageModel, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LiveRows(tiny, rows, [STREAM, "blocks.*.attn.z", MLP])
    assert set(source.ports) == {STREAM, MLP, *(f"blocks.{layer}.attn.z" for layer in range(3))}
    seen: dict[str, Tensor] = {}
    layers = tiny.hf.model.layers

    def keep(name: str, value: Any) -> None:
        seen[name] = (value[0] if isinstance(value, tuple) else value).detach()

    handles = [
        layers[1].register_forward_hook(lambda _m, _a, out: keep(STREAM, out)),
        layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: keep(HEADS, args)),
        layers[2].mlp.register_forward_pre_hook(lambda _m, args: keep(MLP, args)),
    ]
    with torch.no_grad():
        tiny.hf(input_ids=rows)
    for handle in handles:
        handle.remove()
    forwards: list[int] = []
    real = tiny.run
    monkeypatch.setattr(tiny, "run", lambda *a, **o: (forwards.append(1), real(*a, **o))[1], raising=False)
    values = source.values(torch.arange(len(rows)))
    assert len(forwards) == -(-len(rows) // 16)
    mask = counted(rows, tiny.bos_id)
    for name, wanted in seen.items():
        torch.testing.assert_close(values[name], wanted[mask], rtol=1e-5, atol=1e-5)
    with pytest.raises(CutawayError, match="number for each pair of tokens"):
        LiveRows(tiny, rows, "blocks.0.attn.pattern")


def test_long_vectors_are_left_out_wherever_the_stream_is_entered(tiny: LanguageModel, rows: Tensor) -> None:
    rule = Rules(high_norm=1.3)
    options: dict[str, Any] = {"passes": 2, "buffer_tokens": 150}
    source = LiveRows(tiny, rows, [STREAM, HEADS], rules=rule, **options)
    values = source.values(torch.arange(len(rows)))
    bounds = {name: 1.3 * float(value.norm(dim=1).median()) for name, value in values.items()}
    assert source.thresholds == pytest.approx(bounds)
    kept = torch.stack([values[name].norm(dim=1) <= bound for name, bound in bounds.items()]).all(0)
    assert 0.3 < kept.float().mean() < 0.98
    allowed = {tuple(row) for row in values[STREAM][kept].tolist()}
    batches = some(source, 60)
    for batch in batches:
        assert all(tuple(row) in allowed for row in batch[STREAM].tolist())
        assert len(batch[HEADS]) == 32
    for start in (5, 31, 44):
        fresh = LiveRows(tiny, rows, [STREAM, HEADS], rules=rule, **options)
        for found, wanted in zip(some(fresh, 10, start=start), batches[start:], strict=False):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    everything = LiveRows(tiny, rows, STREAM, rules=Rules(bos="keep", first_position="keep"))
    assert len(everything.values(torch.arange(len(rows)))[STREAM]) == rows.numel()


def test_a_store_is_gone_through_in_one_order_an_epoch(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    store = harvest(tiny, rows, [STREAM, HEADS], out=tmp_path / "store", storage=Storage(shard_tokens=100))
    source = StoreSource(tmp_path / "store", seed=3)
    assert source.ports[HEADS].width == 32
    per_epoch = len(store) // 32
    batches = some(source, 2 * per_epoch + 1)
    everything = {tuple(row): place for place, row in enumerate(store[:][STREAM].tolist())}

    def places(part: list[Mapping[str, Tensor]]) -> list[int]:
        return [everything[tuple(row)] for batch in part for row in batch[STREAM].tolist()]

    first, second = places(batches[:per_epoch]), places(batches[per_epoch : 2 * per_epoch])
    # a token behind the same tokens is the same vector, so some are there several times
    times = Counter(tuple(row) for batch in batches[:per_epoch] for row in batch[STREAM].tolist())
    assert not times - Counter(tuple(row) for row in store[:][STREAM].tolist())
    assert times.total() == per_epoch * 32
    assert first != second
    assert max(abs(a - b) for a, b in itertools.pairwise(first)) > len(store) / 2  # over all shards
    heads = store[:][HEADS].flatten(1)
    torch.testing.assert_close(batches[0][HEADS], heads[first[:32]])
    for start in (1, per_epoch - 1, per_epoch, per_epoch + 3):
        entered = some(StoreSource(store, seed=3), 3, start=start)
        assert all(torch.equal(a[STREAM], b[STREAM]) for a, b in zip(entered, batches[start:], strict=False))
    assert StoreSource(store, seed=4).identity != source.identity
    with pytest.raises(CutawayError, match=r"less than one batch of 10000"):
        next(source.batches(10_000))
    with pytest.raises(CutawayError, match="has no site"):
        StoreSource(store, "blocks.2.resid_post")


def test_two_models_read_the_same_tokens(
    tiny: LanguageModel, other: LanguageModel, rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LiveRows([tiny, other], rows, [STREAM, "tuned:blocks.0.mlp.out"])
    assert list(source.ports) == [f"tiny:{STREAM}", f"tuned:{STREAM}", "tuned:blocks.0.mlp.out"]
    values = source.values(torch.arange(8))
    for lm in (tiny, other):
        alone = LiveRows(lm, rows, STREAM).values(torch.arange(8))[STREAM]
        assert torch.equal(values[f"{lm.name}:{STREAM}"], alone)
    assert not torch.equal(values[f"tiny:{STREAM}"], values[f"tuned:{STREAM}"])
    monkeypatch.setattr(other, "loaded_from", "models/my/tuned")  # a port is named by the model's path too
    assert list(LiveRows([tiny, other], rows, f"models/my/tuned:{STREAM}").ports) == [f"tuned:{STREAM}"]
    with pytest.raises(CutawayError, match="a model that is not here"):
        LiveRows([tiny, other], rows, f"third:{STREAM}")

    done = train(
        [tiny, other], crosscoder=STREAM, preset="crosscoder-2024", corpus=rows, out=tmp_path / "a", d_sae=64,
        tokens=1280, batch=64, sample=64,
    )  # fmt: skip
    (name,) = done
    assert name == f"tiny_{STREAM}+tuned_{STREAM}"
    dictionary = load(tmp_path / "a" / name)
    assert [port.site for port in dictionary.inputs] == [STREAM, STREAM]
    hashes = [port.model["weight_hash"] for port in dictionary.inputs]
    assert hashes == [tiny.identity().weight_hash, other.identity().weight_hash]
    judged = evaluate([tiny, other], dictionary, rows[:8], spliced_rows=4)
    assert judged.effects["variance_explained"].value > 0


def test_models_of_other_tokens_are_refused(tiny: LanguageModel, rows: Tensor) -> None:
    from tiny_llama import tiny_llama

    with pytest.raises(CutawayError, match="vocabulary of small"):
        LiveRows([tiny, tiny_llama(name="small")], rows + 0 * rows, STREAM)
    with pytest.raises(CutawayError, match="integers"):
        LiveRows(tiny, rows.float(), STREAM)


def test_tensors_stores_and_models_by_one_function(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    x = torch.randn(2_000, 16, generator=torch.Generator().manual_seed(0))
    (trained,) = train(x, "blocks.0.resid_post", **SMALL).values()
    assert trained.dictionary.site == "blocks.0.resid_post"
    several = train({"a": x, "b": 2 * x}, ["a", "b"], seed=[0, 1], **SMALL)
    assert set(several) == {"a-s0", "a-s1", "b-s0", "b-s1"}
    transcoder = train({"a": x, "b": 2 * x}, "a", to="b", preset="skip-transcoder", **SMALL)
    assert transcoder["a-to-b"].dictionary.kind == "skip_transcoder"
    store = harvest(tiny, rows, HEADS)
    from_store = train(store, HEADS, **SMALL)[HEADS]
    assert from_store.dictionary.metadata["preset"] == "batchtopk"
    live = train(tiny, HEADS, corpus=rows, passes=1, **SMALL)[HEADS]
    assert live.dictionary.d_in == from_store.dictionary.d_in == 32
    with pytest.raises(CutawayError, match="go with a model"):
        train(x, "a", corpus="texts", **SMALL)
    with pytest.raises(CutawayError, match="not on a set"):
        train({3}, "a", **SMALL)  # pyright: ignore[reportArgumentType]
    spoiled = x.clone()
    spoiled[::50, 3] = float("inf")
    with pytest.raises(CutawayError, match="NaN or infinite"):
        train(spoiled, "a", out=tmp_path / "spoiled", **SMALL)
    assert not (tmp_path / "spoiled" / "a").exists()


def test_a_corpus_that_is_only_streamed(tiny: LanguageModel) -> None:
    def texts() -> Iterator[str]:
        for number in itertools.count():  # endless: no more is read than is needed
            yield " ".join(f"w{2 + (7 * number + j * j) % 59}" for j in range(30))

    done = train(tiny, STREAM, corpus=texts, context=16, **SMALL)
    assert done[STREAM].history[-1]["tokens"] == 1280


def test_end_to_end_by_a_setting(tiny: LanguageModel, rows: Tensor) -> None:
    terms = [{"kind": "end_to_end", "weight": 1.0}, {"kind": "reconstruction", "weight": 0.001}]
    done = train(tiny, STREAM, corpus=rows, terms=terms, **SMALL)
    assert done[STREAM].history[-1]["end_to_end"] > 0


def test_figures_are_sent_to_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[tuple[dict[str, float], int]] = []
    begun: dict[str, Any] = {}

    class FakeRun:
        config = types.SimpleNamespace(update=lambda values, allow_val_change: begun.update(values))

        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((values, step))

        def finish(self) -> None:
            begun["finished"] = True

    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **options: (begun.update(options), FakeRun())[1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    x = torch.randn(2_000, 16, generator=torch.Generator().manual_seed(0))
    train(x, "a", out=tmp_path / "run", log="wandb", **SMALL)
    assert begun["resume"] == "allow"
    assert begun["name"] == "run"
    assert begun["finished"]
    assert begun["a"]["d_sae"] == 64
    assert [step for _, step in sent] == list(range(1, 21))
    assert {"a/loss", "a/l0", "a/variance_explained", "a/dead_share"} <= set(sent[-1][0])


def test_figures_are_sent_to_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writers: list[Any] = []

    class FakeWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
            writers.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

        def close(self) -> None:
            self.closed = True

    fake: Any = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    x = torch.randn(2_000, 16, generator=torch.Generator().manual_seed(0))
    train(x, "a", out=tmp_path / "run", log=["tensorboard"], seed=[0, 1], **SMALL)
    assert [writer.log_dir for writer in writers] == [str(tmp_path / "run" / "tensorboard" / f"a-s{i}") for i in (0, 1)]
    assert all(writer.closed and writer.purge_step == 1 for writer in writers)
    steps = [step for name, _, step in writers[0].scalars if name == "loss"]
    assert steps == list(range(1, 21))
    with pytest.raises(CutawayError, match="need a folder"):
        train(x, "a", log="tensorboard", **SMALL)
    with pytest.raises(CutawayError, match="nothing to log to"):
        train(x, "a", log="paper", **SMALL)  # pyright: ignore[reportArgumentType]
