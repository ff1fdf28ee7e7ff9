"""The harvest against a slow oracle: every token that counts, once, with the vector that the model has there."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.corpus import corpus_hash, rows_hash
from cutaway.data.corpus.documents import documents_of
from cutaway.data.corpus.rows import Packing, Reading, text_rows
from cutaway.data.harvesting import harvest as module
from cutaway.data.harvesting import journal
from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.settings import Rules, Storage
from cutaway.data.harvesting.store import Activations, Store
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens

SITES = ["blocks.1.resid_post", "blocks.0.attn.z", "blocks.0.mlp.post"]
SMALL = Storage(shard_tokens=100)


def some_texts(n: int = 60, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (n,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(2, 61, (k,), generator=generator).tolist()) for k in lengths]


def oracle(
    lm: LanguageModel, texts: Sequence[str], context: int, packing: Packing, rules: Rules, site: str = SITES[0]
) -> list[tuple[int, int, int, int, int, Tensor]]:
    """Row by row, token by token: (id, document, offset, position, row, vector)."""
    found = []
    rows = text_rows(lm, documents_of(list(texts)), context, packing, Reading())
    for number, (ids, document, offset) in enumerate(rows):
        value = lm.run(ids.tolist(), capture=site)[site][0]
        for position in range(len(ids)):
            if rules.first_position == "drop" and position == 0:
                continue
            if rules.bos == "drop" and ids[position] == lm.bos_id:
                continue
            found.append((*(int(x[position]) for x in (ids, document, offset)), position, number, value[position]))
    return found


def same(store: Store, expected: list[Any], site: str = SITES[0]) -> None:
    assert len(store) == len(expected)
    everything = store[:]
    for place, name in enumerate(("token", "document", "offset", "position", "row")):
        assert getattr(everything, name).tolist() == [item[place] for item in expected], name
    torch.testing.assert_close(everything[site], torch.stack([item[5] for item in expected]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", ["packed", "document"])
@pytest.mark.parametrize("rules", [Rules(), Rules(bos="keep"), Rules(bos="keep", first_position="keep")], ids=str)
def test_every_token_that_counts_once(tiny: LanguageModel, packing: Packing, rules: Rules) -> None:
    texts = some_texts()
    store = harvest(
        tiny, texts, SITES, context=16, packing=packing, rules=rules, batch_rows=5, storage=Storage(shard_tokens=70)
    )
    expected = oracle(tiny, texts, 16, packing, rules)
    same(store, expected)
    assert [shard.rows for shard in store.shards[:-1]] == [70] * (len(store.shards) - 1)
    assert store.manifest.corpus_hash == corpus_hash(texts)
    assert store.manifest.model == tiny.identity()
    counts = store.counts
    assert counts["kept"] == len(store)
    assert counts["read"] == sum(counts[k] for k in ("first_position", "bos", "high_norm", "kept", "beyond_limit"))
    assert (counts["padding"] > 0) == (packing == "document" or counts["read"] % 16 > 0)
    if packing == "document":
        assert counts["beyond_context"] == sum(max(0, len(text.split()) - 15) for text in texts)


def test_it_is_what_transformers_computes(tiny: LanguageModel) -> None:
    rows = torch.randint(2, 61, (20, 12), generator=torch.Generator().manual_seed(1))
    store = harvest(tiny, rows, SITES, batch_rows=6, rules=Rules(first_position="keep", bos="keep"))
    with torch.no_grad():
        states = tiny.hf(input_ids=rows, output_hidden_states=True).hidden_states
    torch.testing.assert_close(store[:][SITES[0]].view(20, 12, -1), states[2], rtol=1e-5, atol=1e-5)
    assert store.sites == {"blocks.0.attn.z": (4, 8), "blocks.0.mlp.post": (48,), "blocks.1.resid_post": (32,)}
    assert store.manifest.corpus_hash == rows_hash(rows)
    flat = harvest(tiny, rows, SITES[1], storage=Storage(heads="flatten"))
    assert flat.sites == {"blocks.0.attn.z": (32,)}
    kept = harvest(tiny, rows, SITES[1])
    assert torch.equal(flat[:][SITES[1]], kept[:][SITES[1]].flatten(1))


def test_padded_rows_lists_and_tensors_are_the_same_rows(tiny: LanguageModel) -> None:
    lists = [[0, 5, 6, 7], [0, 9], [0, 8, 7]]
    ids = torch.tensor([[1, 0, 5, 6, 7], [1, 1, 1, 0, 9], [1, 1, 0, 8, 7]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
    a = harvest(tiny, lists, SITES[0])
    b = harvest(tiny, Tokens(ids, mask, ((),) * 3), SITES[0])
    assert a[:].token.tolist() == b[:].token.tolist() == [5, 6, 7, 9, 8, 7]
    assert torch.equal(a[:][SITES[0]], b[:][SITES[0]])


@pytest.mark.parametrize("tokens", [1, 69, 70, 71, 140, 500])
def test_a_limit_takes_the_first_tokens(tiny: LanguageModel, tokens: int) -> None:
    texts = some_texts()
    whole = harvest(tiny, texts, SITES[0], context=16, storage=Storage(shard_tokens=70))
    part = harvest(tiny, texts, SITES[0], context=16, storage=Storage(shard_tokens=70), tokens=tokens)
    assert len(part) == tokens
    assert torch.equal(part[:][SITES[0]], whole[:tokens][SITES[0]])
    counts = part.counts
    assert counts["read"] == sum(counts[k] for k in ("first_position", "bos", "high_norm", "kept", "beyond_limit"))


def test_high_norms_are_left_out_and_counted(tiny: LanguageModel) -> None:
    texts = some_texts()
    rules = Rules(high_norm=1.2)
    everything = harvest(tiny, texts, SITES, context=16)[:]
    store = harvest(tiny, texts, SITES, context=16, rules=rules, storage=Storage(shard_tokens=70))
    norms = {site: everything[site].flatten(1).norm(dim=1) for site in SITES}
    limits = {site: 1.2 * float(norm.median()) for site, norm in norms.items()}  # the corpus is shorter than the sample
    assert store.thresholds == pytest.approx(limits, rel=1e-5)
    high = torch.stack([norms[site] > limits[site] for site in SITES])
    assert 0 < int(high.any(0).sum()) < len(norms[SITES[0]])
    assert store.counts["high_norm_by_site"] == dict(zip(SITES, high.sum(1).tolist(), strict=True))
    assert store.counts["high_norm"] == int(high.any(0).sum())
    assert len(store) == store.counts["kept"] == int((~high.any(0)).sum())
    torch.testing.assert_close(store[:][SITES[0]], everything[SITES[0]][~high.any(0)])
    assert store[:].offset.tolist() == everything.offset[~high.any(0)].tolist()


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
@pytest.mark.parametrize("dtype", ["fp32", "float16", "bfloat16"])
def test_a_folder_holds_what_memory_holds(tiny: LanguageModel, tmp_path: Path, file_format: Any, dtype: str) -> None:
    storage = Storage(dtype=dtype, shard_tokens=70)
    stored = replace(storage, file_format=file_format)
    options: dict[str, Any] = {"context": 16, "rules": Rules(high_norm=1.5)}
    if file_format == "parquet" and dtype == "bfloat16":
        with pytest.raises(CutawayError, match="Parquet has no bfloat16"):
            harvest(tiny, some_texts(), SITES, out=tmp_path / "a", storage=stored, **options)
        return
    memory = harvest(tiny, some_texts(), SITES, storage=storage, **options)
    store = harvest(tiny, some_texts(), SITES, out=tmp_path / "a", storage=stored, **options)
    again = Store.open(tmp_path / "a", verify=True)
    for place in (store, again):
        assert all(torch.equal(place[:][site], memory[:][site]) for site in SITES)
        assert torch.equal(place[:].offset, memory[:].offset)
        assert place.counts == memory.counts
        assert place.thresholds == memory.thresholds
    assert memory.dtype == again.dtype == again[0][SITES[0]].dtype
    assert again.manifest.corpus_hash == memory.manifest.corpus_hash
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {f".{file_format}", ".json"}


def test_a_finished_folder_is_opened_and_not_run_again(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = harvest(tiny, some_texts(), SITES[0], out=tmp_path, context=16)
    monkeypatch.setattr(module, "_fill", None)
    again = harvest(tiny, some_texts(), SITES[0], out=tmp_path, context=16)
    assert again.manifest == first.manifest


def different(tiny: LanguageModel) -> dict[str, tuple[dict[str, Any], str]]:
    other = attach(tiny.hf, tiny.tokenizer, name="other")
    return {
        "corpus": ({"corpus": some_texts(seed=1)}, "another corpus"),
        "site": ({"sites": SITES[1]}, "its sites is"),
        "rules": ({"rules": Rules(bos="keep")}, "its rules is"),
        "context": ({"context": 12}, "its rows is"),
        "dtype": ({"storage": replace(SMALL, dtype="float16")}, "its dtype is float32, not float16"),
        "limit": ({"tokens": 50}, "its tokens is None, not 50"),
        "batch": ({"batch_rows": 3}, "its batch rows is 16, not 3"),
        "model": ({"lm": other}, "its model is"),
    }


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_harvest_is_left_alone(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    given: dict[str, Any] = {"lm": tiny, "corpus": some_texts(), "sites": SITES[0], "context": 16, "storage": SMALL}
    out = tmp_path / "a"
    if finished:
        harvest(out=out, **given)
    else:
        stop_after(2, monkeypatch, lambda: harvest(out=out, **given))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for change, words in different(tiny).values():
        with pytest.raises(CutawayError, match=words):
            harvest(out=out, **{**given, **change})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert len(harvest(out=out, **given)) == len(harvest(**given))


def stop_after(shards: int, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    """Run a harvest that is interrupted when it begins to write one shard more."""
    from cutaway.data.harvesting import journal

    left, write = shards, journal.write_shard

    def stopping(*arguments: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            call()


def test_an_unfinished_folder_says_so_and_goes_on(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUTAWAY_QUIET", raising=False)
    given: dict[str, Any] = {"lm": tiny, "corpus": some_texts(), "sites": SITES, "context": 16, "storage": SMALL}
    whole = harvest(out=tmp_path / "whole", **given)
    stop_after(3, monkeypatch, lambda: harvest(out=tmp_path / "cut", **given))
    with pytest.raises(CutawayError, match="not finished; run the same harvest again"):
        Store.open(tmp_path / "cut")
    journal = tmp_path / "cut" / "journal-00000.jsonl"
    with open(journal, "ab") as file:
        file.write(b'{"shard": 3, "ro')  # killed while it was writing a line
    (tmp_path / "cut" / ".shard-000003.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "cut" / "shard-000003.safetensors").write_bytes(b"under its name, but not in the journal")
    runs: list[int] = []
    counting = Counting(tiny, runs)
    assert "goes on at" not in capsys.readouterr().err
    harvest(out=tmp_path / "cut", **{**given, "lm": counting})
    assert f"goes on at {sum(shard.rows for shard in whole.shards[:3])} tokens (" in capsys.readouterr().err
    same_bytes(tmp_path / "cut", tmp_path / "whole")
    assert len(runs) < whole.counts["read"] / 16 / 16  # what was there was not run again


class Counting:
    """A model that notes its runs."""

    def __init__(self, lm: LanguageModel, runs: list[int]) -> None:
        self.lm, self.runs = lm, runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def run(self, tokens: Tokens, **options: Any) -> Any:
        self.runs.append(len(tokens))
        return self.lm.run(tokens, **options)


def same_bytes(a: Path, b: Path) -> None:
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())
    for path in a.iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (b / path.name).read_bytes(), path.name
    infos = [json.loads((folder / "manifest.json").read_text()) for folder in (a, b)]
    for info in infos:
        info["manifest"]["created"] = None
    assert infos[0] == infos[1]


def test_a_corpus_that_changed_meanwhile_is_noticed(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iterable has no fingerprint; the hash of what was read tells."""
    texts = some_texts()
    given: dict[str, Any] = {"lm": tiny, "sites": SITES[0], "context": 16, "storage": SMALL}
    stop_after(2, monkeypatch, lambda: harvest(corpus=lambda: iter(texts), out=tmp_path / "a", **given))
    with pytest.raises(CutawayError, match=r"not the one that .* was begun with"):
        harvest(corpus=lambda: iter(["w5", *texts]), out=tmp_path / "a", **given)
    assert len(harvest(corpus=iter(texts), out=tmp_path / "a", **given)) == len(harvest(corpus=texts, **given))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_shards(
    tiny: LanguageModel, tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"lm": tiny, "corpus": some_texts(), "sites": SITES, "context": 16, "storage": SMALL}
    harvest(out=tmp_path / "one", rules=Rules(high_norm=1.3), **given)
    finish = module.Folder.finish
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen: list[set[str]] = []
    for rank in range(world):  # one after the other: only the last one finds that all is there
        if rank < world - 1:
            monkeypatch.setattr(module.Folder, "finish", lambda *_: None)
        else:
            monkeypatch.setattr(module.Folder, "finish", finish)
        monkeypatch.setenv("RANK", str(rank))
        harvest(out=tmp_path / "many", rules=Rules(high_norm=1.3), **given)
        seen.append({path.name for path in (tmp_path / "many").glob("shard-*")})
    same_bytes(tmp_path / "many", tmp_path / "one")
    own = [seen[0], *(b - a for a, b in pairwise(seen))]
    assert all(own)
    assert sum(map(len, own)) == len(set().union(*own))


def test_a_site_that_has_no_vector_a_token_is_refused(tiny: LanguageModel) -> None:
    for site in ("blocks.0.attn.pattern", "blocks.*.attn.scores"):
        with pytest.raises(CutawayError, match="a number for each pair of tokens"):
            harvest(tiny, ["w5 w6"], site)
    with pytest.raises(CutawayError, match="no site"):
        harvest(tiny, ["w5 w6"], "blocks.0.nothing")
    with pytest.raises(CutawayError, match="at least one site"):
        harvest(tiny, ["w5 w6"], [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"storage": Storage("int8")}, "not as 'int8'"),
        ({"storage": Storage(file_format=cast(Any, "csv"))}, "not 'csv'"),
        ({"storage": Storage(heads=cast(Any, "drop"))}, "heads is 'drop'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"context": 1000}, "longer than the 64 of tiny"),
        ({"corpus": ["w5"], "context": 16, "rules": Rules(first_position="drop")}, None),
        ({"corpus": [[0]]}, "no token that the rules keep"),
        ({"corpus": []}, "no token that the rules keep"),
        ({"corpus": torch.zeros(2, 3)}, "integers"),
        ({"corpus": torch.full((2, 3), 61)}, "between 0 and 60"),
        ({"corpus": [[1, 2], [3, "a"]]}, "not a mixture"),
        ({"corpus": 5}, "not a int"),
    ],
)
def test_bad_input_is_one_sentence(tiny: LanguageModel, options: dict[str, Any], words: str | None) -> None:
    given: dict[str, Any] = {"corpus": ["w5 w6 w7"], "sites": SITES[0], "context": 16, **options}
    if words is None:
        assert len(harvest(tiny, **given)) > 0
        return
    with pytest.raises(CutawayError, match=words) as raised:
        harvest(tiny, **given)
    assert "\n" not in str(raised.value)


def test_rules_that_are_none() -> None:
    with pytest.raises(CutawayError, match="rule bos is 'maybe'"):
        Rules(bos="maybe")  # type: ignore[arg-type]
    for factor in (0.5, 1.0, float("nan")):
        with pytest.raises(CutawayError, match="multiple of the median"):
            Rules(high_norm=factor)


def test_values_that_a_dtype_cannot_hold_are_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    class Loud(Counting):
        def run(self, tokens: Tokens, **options: Any) -> Any:
            run = self.lm.run(tokens, **options)
            return {site: run[site] * 1e6 for site in options["capture"]}

    for out in (None, tmp_path / "a"):
        with pytest.raises(CutawayError, match=r"beyond 6.55e\+04, the largest float16; store bfloat16"):
            harvest(Loud(tiny, []), some_texts(), SITES[0], context=16, storage=Storage("float16"), out=out)  # type: ignore[arg-type]
    assert not list((tmp_path / "a").glob("shard*"))


def test_a_folder_with_other_files_is_not_used(tiny: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CutawayError, match="holds other files"):
        harvest(tiny, some_texts(), SITES[0], out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CutawayError, match="could not be written"):
        harvest(tiny, some_texts(), SITES[0], out=tmp_path / "thesis.tex")


def test_a_limit_that_no_corpus_reaches_is_none(tiny: LanguageModel) -> None:
    whole = harvest(tiny, some_texts(), SITES[0], context=16)
    assert len(harvest(tiny, some_texts(), SITES[0], context=16, tokens=10**30)) == len(whole)


def test_a_corpus_that_is_refused_leaves_nothing_behind(tiny: LanguageModel, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"")
    with pytest.raises(CutawayError, match="holds no text"):
        harvest(tiny, corpus, SITES[0], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    corpus.write_text("w5 w6 w7 w8")
    assert len(harvest(tiny, corpus, SITES[0], out=tmp_path / "out", context=16)) > 0


def test_two_writers_do_not_mix(tiny: LanguageModel, tmp_path: Path) -> None:
    from cutaway.data.harvesting.journal import Folder

    plan = module._plan(tiny, some_texts(), SITES[0], None, (16, "packed", 16), Rules(), Storage())
    with (
        Folder(tmp_path / "a", plan.header, 0, 1),
        pytest.raises(CutawayError, match="another process is writing"),
        Folder(tmp_path / "a", plan.header, 0, 1),
    ):
        pass


@pytest.mark.parametrize(("rank", "world", "words"), [("2", "2", "outside"), ("x", "2", "must be numbers")])
def test_a_strange_environment(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, world: str, words: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(CutawayError, match=words):
        harvest(tiny, some_texts(), SITES[0], out=tmp_path / "a")


# Reading


@pytest.fixture(scope="module")
def saved(tiny: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "a"
    harvest(tiny, some_texts(), SITES, out=folder, context=16, storage=SMALL)
    return folder


def triples(batches: Sequence[Activations]) -> list[tuple[int, int]]:
    return [(d, o) for b in batches for d, o in zip(b.document.tolist(), b.offset.tolist(), strict=True)]


def test_batches_are_the_store_shuffled(saved: Path) -> None:
    store = Store.open(saved)
    everything = triples([store[:]])
    assert len(set(everything)) == len(store)
    found = list(store.batches(64, seed=1))
    assert [len(batch) for batch in found[:-1]] == [64] * (len(found) - 1)
    assert sorted(triples(found)) == sorted(everything)
    assert triples(found) != everything
    assert triples(list(store.batches(64, shuffle=False))) == everything
    assert triples(list(store.batches(64, seed=1, epoch=1))) != triples(found)
    where = {place: number for number, place in enumerate(everything)}
    for batch in found:  # every value travels with its token
        places = [where[place] for place in triples([batch])]
        assert torch.equal(batch[SITES[0]], store[places][SITES[0]])
    assert len(list(store.batches(64, drop_last=True))) == len(store) // 64


def test_batches_can_be_entered_anywhere(saved: Path) -> None:
    store = Store.open(saved)
    whole = list(store.batches(50, seed=2, sites=[SITES[1]]))
    assert set(whole[0].values) == {SITES[1]}
    for start in (0, 1, 7, len(whole) - 1, len(whole)):
        entered = list(store.batches(50, seed=2, start=start, sites=[SITES[1]]))
        assert len(entered) == len(whole) - start
        assert all(torch.equal(a[SITES[1]], b[SITES[1]]) for a, b in zip(entered, whole[start:], strict=True))


def test_one_token_several_and_a_slice(saved: Path) -> None:
    store = Store.open(saved)
    everything = store[:]
    assert store[7][SITES[1]].shape == (4, 8)
    assert torch.equal(store[-1][SITES[0]], everything[SITES[0]][-1])
    for index in ([5, 299, 0, 5], torch.tensor([5, 299, 0, 5])):
        assert torch.equal(store[index][SITES[0]], everything[SITES[0]][[5, 299, 0, 5]])
        assert store[index].row.tolist() == everything.row[[5, 299, 0, 5]].tolist()
    assert store[98:104].token.tolist() == everything.token[98:104].tolist()
    for wrong in (len(store), -len(store) - 1, [0, len(store)]):
        with pytest.raises(IndexError):
            store[wrong]
    with pytest.raises(CutawayError, match=r"no site 'blocks.9"):
        next(store.batches(5, sites=["blocks.9.resid_post"]))
    with pytest.raises(CutawayError, match="0 tokens is none"):
        next(store.batches(0))
    assert "blocks.0.attn.z [4, 8]" in repr(store)


def test_a_finished_harvest_that_was_changed_is_noticed_when_it_is_asked_for_again(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(verify: bool = False) -> Store:
        return harvest(
            tiny, some_texts(), SITES[0], out=tmp_path / "s", context=16, storage=replace(SMALL, verify=verify)
        )

    again()
    leftover = tmp_path / "s" / f".manifest.json.{'0' * 24}.tmp"
    leftover.write_text("half")
    os.utime(leftover, (0, 0))
    again()
    assert not leftover.exists()
    damage(tmp_path / "s", "one byte")
    with pytest.raises(CutawayError, match="SHA-256 differs"):
        again()
    monkeypatch.setattr(journal, "_QUICKLY_HASHED", 100)
    assert "sizes" not in capsys.readouterr().err
    again()
    assert "have the right sizes, and --verify reads them" in capsys.readouterr().err
    with pytest.raises(CutawayError, match="SHA-256 differs"):
        again(verify=True)


def damage(folder: Path, how: str) -> None:
    shard, manifest = folder / "shard-000001.safetensors", folder / "manifest.json"
    match how:
        case "cut short":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "missing":
            shard.unlink()
        case "one byte":
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
        case "garbage of the same length":
            shard.write_bytes(b"\xff" * shard.stat().st_size)
        case "another's shard":
            from safetensors.torch import save_file

            size = shard.stat().st_size
            save_file({"x": torch.zeros(3)}, shard)
            with open(shard, "ab") as file:
                file.write(b" " * (size - shard.stat().st_size))
        case "no manifest":
            manifest.unlink()
        case "a manifest of something else":
            manifest.write_text('{"kind": "dictionary"}')
        case "a changed manifest":
            info = json.loads(manifest.read_text())
            info["manifest"]["corpus_hash"] = "0"
            manifest.write_text(json.dumps(info))
        case "no JSON":
            manifest.write_text("{")
        case "no folder":
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut short", "shard-000001.safetensors has .* bytes instead of .*: it was cut short"),
        ("missing", "shard-000001.safetensors is missing"),
        ("one byte", "shard-000001.safetensors is not what was written: its SHA-256"),
        ("garbage of the same length", "SHA-256|cannot be read"),
        ("another's shard", "SHA-256|cannot be read"),
        ("no manifest", "has no manifest.json"),
        ("a manifest of something else", "something else than activations"),
        ("a changed manifest", "was changed after it was written"),
        ("no JSON", "is not JSON"),
        ("no folder", "there is no such folder"),
    ],
)
def test_a_damaged_store_is_named(saved: Path, tmp_path: Path, how: str, words: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    damage(folder, how)
    with pytest.raises(CutawayError, match=words) as raised:
        Store.open(folder, verify=True)
    assert "\n" not in str(raised.value)
    if how in ("garbage of the same length", "another's shard"):  # without the hash it is seen when it is read
        with pytest.raises(CutawayError, match=r"cannot be read|does not hold what the manifest says"):
            Store.open(folder)[150]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *[((name,), value) for name in ("sites", "dtype", "format", "counts", "shards") for value in (None, 3, "x")],
        (("sites", SITES[0]), [-1]),
        (("shards", 0), {}),
        (("shards", 0, "file"), "../shard-000000.safetensors"),
        (("shards", 0, "file"), "/etc/passwd"),
        (("shards", 0, "rows"), -1),
        (("shards", 0, "bytes"), "many"),
    ],
    ids=str,
)
def test_a_manifest_that_says_nonsense_is_named(
    saved: Path, tmp_path: Path, where: tuple[str | int, ...], value: Any
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    info = json.loads((folder / "manifest.json").read_text())
    place = info
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(info))
    with pytest.raises(CutawayError, match=f"manifest.json is damaged at {where[0]}"):
        Store.open(folder)


def test_a_damaged_header_keeps_a_harvest_out(tiny: LanguageModel, tmp_path: Path) -> None:
    harvest(tiny, some_texts(), SITES[0], context=16, out=tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    info = json.loads(file.read_text())
    for header in (None, [], {}, {**info["header"], "settings": 3}):
        file.write_text(json.dumps({**info, "header": header}))
        with pytest.raises(CutawayError, match="is damaged; name another folder"):
            harvest(tiny, some_texts(), SITES[0], context=16, out=tmp_path / "a")


def resident() -> int:
    """Bytes of this process in memory that belong to it alone."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the memory from")
def test_memory_is_flat_over_a_thousand_batches(tiny: LanguageModel, tmp_path: Path) -> None:
    sizes: list[int] = []

    class Watched(Counting):
        def run(self, tokens: Tokens, **options: Any) -> Any:
            sizes.append(resident())
            return super().run(tokens, **options)

    sites = ["blocks.*.mlp.post", "blocks.*.resid_post"]  # 240 numbers a token
    texts = (f"w{2 + i % 50} w{2 + i % 59} w{2 + i % 17}" for i in range(10**9))  # without end
    limit = 1000 * 8 * 23
    watched: Any = Watched(tiny, [])
    store = harvest(
        watched, texts, sites, out=tmp_path, context=24, batch_rows=8, tokens=limit, storage=Storage(shard_tokens=4096),
        rules=Rules(bos="keep"),
    )  # fmt: skip
    assert len(store) == limit
    assert len(sizes) == 1000
    written = sum(shard.bytes for shard in store.shards)
    assert written > 170 << 20
    assert max(sizes[400:]) - max(sizes[100:300]) < 8 << 20
