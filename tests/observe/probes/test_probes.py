"""What probes read, compared with raw hooks; what a sweep finds where the answer is planted; saved and loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import false_discovery, wilson_interval
from cutaway.model.language_model import LanguageModel
from cutaway.observe.probes.controls import (
    bag_of_tokens,
    chance_p,
    control_labels,
    control_types,
    group_interval,
    mean_interval,
    shuffled_labels,
)
from cutaway.observe.probes.data import collect, probe_data, read_site, site_width
from cutaway.observe.probes.fitting import CrossValidated, Scorer, folds, probabilities, score
from cutaway.observe.probes.probe import Probe, fit_calibrator, load_probe
from cutaway.observe.probes.sweep import ProbeSweep, probe_sweep, reliability
from cutaway.observe.random_weights import cascade, untrained


def rows(n: int = 60, seed: int = 0, low: int = 4, high: int = 10) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 97, generator.integers(low, high)).tolist() for _ in range(n)]


def by_hooks(lm: LanguageModel, texts: list[list[int]]) -> list[list[torch.Tensor]]:
    """The stream [p, d] after each decoder layer, text by text without padding, from torch's own hooks."""
    out = []
    for text in texts:
        found: list[torch.Tensor] = []

        def hook(module: Any, arguments: Any, output: Any, found: list[torch.Tensor] = found) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0].clone())

        handles = [layer.register_forward_hook(hook) for layer in lm.hf.model.layers]  # type: ignore[union-attr]
        with torch.no_grad():
            lm.hf(input_ids=torch.tensor([text]))
        for handle in handles:
            handle.remove()
        out.append(found)
    return out


@pytest.fixture(scope="module")
def planted(llama: LanguageModel) -> tuple[list[list[int]], list[str]]:
    """Texts and a label that is a linear function of the stream after layer 1 at the last token, with a margin."""
    texts = rows(400)
    stream = torch.stack([layers[1][-1] for layers in by_hooks(llama, texts)])
    direction = torch.randn(stream.shape[1], generator=torch.Generator().manual_seed(5))
    along = (stream - stream.mean(0)) @ direction
    order = along.argsort().tolist()
    chosen = order[:60] + order[-60:]
    return [texts[i] for i in chosen], ["low"] * 60 + ["up"] * 60


@pytest.fixture(scope="module")
def sweep(llama: LanguageModel, planted: tuple[list[list[int]], list[str]]) -> ProbeSweep:
    return probe_sweep(llama, probe_data(llama, *planted), n_folds=4, draws=4)


# What is read


def test_each_position_rule_reads_what_raw_hooks_see(llama: LanguageModel) -> None:
    texts = rows(12)
    texts[3] = [llama.hf.config.bos_token_id or 0, *texts[3]]
    seen = by_hooks(llama, texts)
    sites = ["blocks.0.resid_post", "blocks.2.resid_post"]
    last, mean, second, every = (read_site(llama, texts, sites, position=rule) for rule in ("last", "mean", 1, "every"))
    places = [i % len(text) for i, text in enumerate(texts)]
    given = read_site(llama, texts, sites, position=places)
    for name, layer in zip(sites, (0, 2), strict=True):
        stream = [found[layer].numpy() for found in seen]
        for got, oracle in (
            (last[name], [s[-1] for s in stream]),
            (mean[name], [s.mean(0) for s in stream]),
            (second[name], [s[1] for s in stream]),
            (given[name], [s[p] for s, p in zip(stream, places, strict=True)]),
            (every[name], [vector for s in stream for vector in s]),
        ):
            np.testing.assert_allclose(got, np.stack(oracle), rtol=1e-4, atol=1e-4)


def test_a_mean_leaves_out_the_beginning_of_text(atlas: LanguageModel) -> None:
    text = "A dog ran"
    assert atlas.tokens(text).row_ids(0)[0] == atlas.bos_id
    stream = atlas.run(text, capture="blocks.1.resid_post", logits=None)["blocks.1.resid_post"][0]
    got = read_site(atlas, [text], "blocks.1.resid_post", position="mean")["blocks.1.resid_post"]
    np.testing.assert_allclose(got[0], stream[1:].mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_a_match_reads_the_last_token_of_each_texts_own_word(atlas: LanguageModel) -> None:
    texts, words = ["Paris is in France", "The city of Oakland lies there"], ["Paris", " Oakland"]
    got = read_site(atlas, texts, "embed", position=words)["embed"]
    for i, (text, word) in enumerate(zip(texts, words, strict=True)):
        at = atlas.tokens(text).find(0, word)
        np.testing.assert_array_equal(got[i], atlas.run(text, capture="embed", logits=None)["embed"][0, at].numpy())
    with pytest.raises(CutawayError, match="does not occur"):
        read_site(atlas, texts, "embed", position="match:Berlin")


def test_heads_stand_side_by_side_or_alone(llama: LanguageModel) -> None:
    texts = rows(5)
    whole = read_site(llama, texts, "blocks.1.attn.z")["blocks.1.attn.z"]
    for head in range(llama.n_heads):
        one = read_site(llama, texts, "blocks.1.attn.z", head=head)["blocks.1.attn.z"]
        np.testing.assert_array_equal(one, whole[:, head * llama.d_head : (head + 1) * llama.d_head])
    assert site_width(llama, "blocks.1.attn.z") == llama.n_heads * llama.d_head
    with pytest.raises(CutawayError, match="heads 0 to 3; there is no head 4"):
        site_width(llama, "blocks.1.attn.z", 4)
    with pytest.raises(CutawayError, match="has no heads"):
        site_width(llama, "blocks.1.resid_post", 0)
    with pytest.raises(CutawayError, match="one vector per token"):
        site_width(llama, "blocks.1.attn.pattern")


def test_the_texts_are_run_once_whatever_the_number_of_sites(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = rows(40)
    data = probe_data(llama, texts, ["a", "b"] * 20)
    calls: list[Any] = []
    run = llama.run
    monkeypatch.setattr(llama, "run", lambda tokens, **o: calls.append(len(tokens)) or run(tokens, **o))
    collect(llama, data, "blocks.*.resid_post")
    assert sum(calls) == 40


# Labels and groups


def test_labels_become_classes_or_targets(llama: LanguageModel) -> None:
    texts = rows(30)
    data = probe_data(llama, texts, [True, False, True] * 10)
    assert data.classes == ("false", "true")
    assert data.balance() == {"false": 10, "true": 20}
    assert probe_data(llama, texts, ["10", "9", "1"] * 10).classes == ("1", "9", "10")
    assert probe_data(llama, texts, list(range(30))).regression
    assert probe_data(llama, texts, [str(i) for i in range(30)]).classes is not None
    assert probe_data(llama, texts, [0.5, 1.5] * 15).regression
    assert not probe_data(llama, texts, [0, 1] * 15).regression
    assert probe_data(llama, texts, [0, 1] * 15, regression=True).regression


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1, 1, 1, 1], "at least two classes"),
        ([1, 0, None, 1], "label of example 2 is missing"),
        ([1.5, 0.5, float("nan"), 1.0], "label of example 2 is missing or not a number"),
        ([1, 0, 1], "4 texts but 3 labels"),
        (["a", "b", " ", "a"], "label of example 2 is missing"),
    ],
)
def test_bad_labels_are_one_sentence(llama: LanguageModel, labels: list[Any], says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        probe_data(llama, rows(4), labels)


def test_equal_texts_and_named_groups_are_joined(llama: LanguageModel) -> None:
    texts = [[5, 6], [7, 8], [5, 6], [9, 10], [11, 12]]
    data = probe_data(llama, texts, list("ababa"))
    assert len(set(data.groups.tolist())) == 4
    assert data.groups[0] == data.groups[2]
    # text 0 = text 2, and 2 is with 3: all three hang together
    joined = probe_data(llama, texts, list("ababa"), groups=["x", "y", "z", "z", "w"]).groups
    assert joined[0] == joined[2] == joined[3]
    assert len(set(joined.tolist())) == 3


def test_every_token_with_labels_of_its_own(llama: LanguageModel) -> None:
    texts = [[5, 6, 7], [8, 9]]
    data = probe_data(llama, texts, [["a", None, "b"], ["b", "a"]], position="every")
    assert data.row.tolist() == [0, 0, 1, 1]
    assert data.at.tolist() == [0, 2, 0, 1]
    assert data.token_ids().tolist() == [5, 7, 8, 9]
    assert data.groups.tolist() == [0, 0, 1, 1]  # the tokens of one text are one group
    with pytest.raises(CutawayError, match="list of 2 labels for text 1"):
        probe_data(llama, texts, [["a", "a", "b"], ["b"]], position="every")
    with pytest.raises(CutawayError, match="no position rule 'first'"):
        probe_data(llama, texts, ["a", "b"], position="first")


# Controls


def test_shuffled_labels_keep_the_labels_and_what_hangs_together() -> None:
    groups = np.repeat(np.arange(10), 3)
    labels = (np.arange(10) % 2)[groups]
    generator = np.random.default_rng(0)
    drawn = [shuffled_labels(labels, groups, generator) for _ in range(20)]
    assert all(d.sum() == labels.sum() for d in drawn)
    assert all(len(np.unique(d[groups == g])) == 1 for d in drawn for g in range(10))
    assert any((d != labels).any() for d in drawn)
    mixed = np.arange(30) % 2  # a group with both labels: rows are dealt out
    assert any(len(np.unique(shuffled_labels(mixed, groups, generator)[:3])) == 2 for _ in range(5))


def test_a_control_label_belongs_to_the_type() -> None:
    types = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    for seed in range(10):
        drawn = control_labels(types, labels, np.random.default_rng(seed))
        np.testing.assert_array_equal(drawn[:4], drawn[4:])
        assert set(drawn) == {0, 1}


def test_types_are_named_groups_or_the_token_that_is_read(llama: LanguageModel) -> None:
    texts = [[i, 5 + i % 4] for i in range(10, 30)]
    data = probe_data(llama, texts, ["a", "b"] * 10)
    found = control_types(data)
    assert found is not None
    assert found[1] == "token"
    assert len(set(found[0].tolist())) == 4
    grouped = control_types(probe_data(llama, texts, ["a", "b"] * 10, groups=[i % 5 for i in range(20)]))
    assert grouped is not None
    assert grouped[1] == "group"
    assert control_types(probe_data(llama, texts, ["a", "b"] * 10, position="mean")) is None


def test_the_bag_counts_what_the_model_may_have_read(llama: LanguageModel) -> None:
    texts = [[5, 6, 5, 7], [7, 8]]
    whole = bag_of_tokens(probe_data(llama, texts, ["a", "b"])).toarray()
    np.testing.assert_array_equal(whole, [[2, 1, 1, 0], [0, 0, 1, 1]])
    prefix = bag_of_tokens(probe_data(llama, texts, ["a", "b"], position=1)).toarray()
    np.testing.assert_array_equal(prefix, [[1, 1, 0, 0], [0, 0, 1, 1]])
    every = bag_of_tokens(probe_data(llama, texts, [["a", "b", "a", "b"], ["a", "b"]], position="every")).toarray()
    np.testing.assert_array_equal(every[2], [2, 1, 0, 0, 1, 0, 0, 0])


def test_an_interval_draws_groups_not_rows() -> None:
    """Four copies of each example say no more than one: the interval must not shrink."""
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 2
    scores = generator.normal(size=(40, 1)) + labels[:, None]
    fold = np.zeros(40, dtype=int)
    once = group_interval(Scorer(labels, scores, fold, np.zeros(40), 2), np.arange(40))
    four = np.repeat(np.arange(40), 4)
    copies = group_interval(Scorer(labels[four], scores[four], fold[four], np.zeros(160), 2), four)
    np.testing.assert_allclose(copies, once, atol=1e-6)


@pytest.mark.parametrize("n_classes", [None, 2, 3])
def test_the_p_of_a_probe_counts_labellings_that_score_as_high(n_classes: int | None) -> None:
    """By the slow scorer, one labelling after another; groups keep their one label."""
    generator = np.random.default_rng(4)
    groups, fold = np.arange(48) // 2, np.repeat(np.arange(3), 16)
    labels = (generator.standard_normal(24) if n_classes is None else generator.integers(0, n_classes, 24))[groups]
    scores = generator.standard_normal((48, 1 if n_classes in (None, 2) else n_classes))
    scores[:, -1] += 0.4 * labels
    baseline = np.full(48, labels.mean())
    cv = CrossValidated(scores, fold, baseline, np.zeros((1, 1)), (), n_classes)
    p = chance_p(cv, labels, groups, draws=99, seed=6)
    drawn = np.random.default_rng(9)
    others = [shuffled_labels(labels, groups, drawn) for _ in range(99)]
    slow = [score(one, scores, fold, baseline, n_classes) for one in [labels, *others]]
    assert p == (1 + sum(one >= slow[0] - 1e-12 for one in slow[1:])) / 100
    assert 0 < p < 1


def test_a_perfect_probe_has_an_interval_all_the_same() -> None:
    labels = np.arange(12) % 2
    scores = (labels - 0.5)[:, None]
    low, high = group_interval(Scorer(labels, scores, np.zeros(12), np.zeros(12), 2), np.arange(12))
    assert (low, high) == (wilson_interval(12, 12)[0], 1.0)
    assert mean_interval(np.ones(12), np.arange(12), 0, share=True) == wilson_interval(12, 12)
    assert mean_interval(np.zeros(12), np.arange(12), 0, share=True) == wilson_interval(0, 12)


def test_an_untrained_model_is_another_model_and_changes_nothing(llama: LanguageModel) -> None:
    before = {name: p.clone() for name, p in llama.hf.named_parameters()}
    state = torch.get_rng_state()
    one, same, other = untrained(llama, 1), untrained(llama, 1), untrained(llama, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in llama.hf.named_parameters())
    weights = [m.hf.get_output_embeddings().weight for m in (one, same, other)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_cascade_goes_from_the_top_down(llama: LanguageModel) -> None:
    text, sites = rows(1), "blocks.*.resid_post"
    real = llama.run(text, capture=sites)
    stages: list[tuple[str, list[bool]]] = []
    for what, model in cascade(llama, steps=3):
        run = model.run(text, capture=sites)
        stages.append((what, [torch.equal(run[site], real[site]) for site in real.sites]))
    assert stages == [
        ("layer 2", [True, True, False]),
        ("layers 1–2", [True, False, False]),
        ("layers 0–2", [False] * 3),
        ("everything", [False] * 3),
    ]


# The sweep


def test_a_planted_feature_is_found_and_its_controls_are_at_chance(sweep: ProbeSweep) -> None:
    row = sweep.at("blocks.1.resid_post")
    assert row.effect.value > 0.98
    assert row.effect.n == 120
    low, high = row.effect.interval or (0, 0)
    assert low <= row.effect.value <= high
    names = {c.name.split(" (")[0]: c.value for c in row.effect.controls}
    assert {*names} >= {
        "shuffled labels", "untrained model", "bag of tokens", "position and length", "embedding"
    }  # fmt: skip
    assert 0.35 < names["shuffled labels"] < 0.65
    assert names["position and length"] < 0.75
    assert names["bag of tokens"] < row.effect.value
    assert sweep.picked.value > 0.9
    assert row.accuracy is not None
    assert row.accuracy.controls[0].value == 0.5


def test_the_figure_is_scikit_learns_on_hand_collected_activations(
    llama: LanguageModel, planted: tuple[list[list[int]], list[str]]
) -> None:
    """One fold at the chosen strength, done by hand from raw hooks."""
    texts, labels = planted
    x = torch.stack([layers[1][-1] for layers in by_hooks(llama, texts)]).double().numpy()
    y = np.array([label == "up" for label in labels]).astype(int)
    from cutaway.observe.probes.fitting import cross_validate

    data = probe_data(llama, texts, labels)
    features = collect(llama, data, "blocks.1.resid_post")["blocks.1.resid_post"]
    splits = folds(data.labels, data.groups, 4, regression=False)
    cv = cross_validate("logistic", features, data.labels, data.groups, 2, splits, strength=0.1)
    for i, (train, test) in enumerate(splits):
        scaler = StandardScaler().fit(x[train])
        model = LogisticRegression(C=0.1, max_iter=500).fit(scaler.transform(x[train]), y[train])
        oracle = model.decision_function(scaler.transform(x[test]))
        np.testing.assert_allclose(cv.scores[test, 0], oracle, rtol=1e-3, atol=1e-3)
        assert (cv.fold[test] == i).all()


def test_everything_is_in_the_json_and_the_table(sweep: ProbeSweep) -> None:
    found = sweep.to_json()
    assert [row["site"] for row in found["rows"]] == [f"blocks.{i}.resid_post" for i in range(3)]
    assert found["classes"] == {"low": 60, "up": 60}
    assert found["rows"][1]["effect"]["interval"] is not None
    assert [row["q"] for row in found["rows"]] == list(sweep.q)
    assert sweep.q == tuple(false_discovery([row.p for row in sweep.sites]))
    assert sweep.sites[1].p == 0.001
    text = str(sweep)
    for word in (
        "AUROC",
        "shuffled",
        "untrained",
        "bag of tokens:",
        "embedding:",
        "majority class",
        "inside each fold",
    ):
        assert word in text


def test_regression_and_more_classes(llama: LanguageModel, planted: tuple[list[list[int]], list[str]]) -> None:
    texts, _ = planted
    lengths = [float(len(text)) + 0.5 for text in texts]
    found = probe_sweep(
        llama, probe_data(llama, texts, lengths), sites="blocks.0.resid_post", kind="ridge", n_folds=3, draws=2
    )
    assert found.measure == "R²"
    controls = {c.name: c.value for c in found.sites[0].effect.controls}
    assert controls["position and length"] > 0.99  # the length itself
    assert controls["shuffled labels"] < 0.1
    assert found.sites[0].reliability is None
    third = [str(len(text) % 3) for text in texts]
    many = probe_sweep(
        llama, probe_data(llama, texts, third), sites="blocks.0.resid_post", kind="mass-mean", n_folds=3, draws=2,
        with_untrained=False,
    )  # fmt: skip
    assert many.sites[0].probe.direction("1").shape == (32,)
    with pytest.raises(CutawayError, match="name its label"):
        many.sites[0].probe.direction()
    assert any("untrained" in note for note in many.notes)


def test_calibration_helps_a_probe_that_is_too_sure() -> None:
    """Scores ten times too large: Platt's slope takes them back; isotonic's steps too."""
    generator = np.random.default_rng(0)
    honest = generator.normal(size=4000) * 1.5
    labels = (generator.random(4000) < expit(honest)).astype(int)
    scores = 10 * honest
    before = reliability(probabilities(scores[2000:, None]), labels[2000:])
    for kind in ("platt", "isotonic"):
        calibrator = fit_calibrator(kind, scores[:2000], labels[:2000])  # type: ignore[arg-type]
        positive = calibrator(scores[2000:])
        after = reliability(np.stack([1 - positive, positive], 1), labels[2000:])
        assert after.ece < 0.05 < before.ece
        assert after.brier < before.brier
    platt = fit_calibrator("platt", scores[:2000], labels[:2000])
    assert platt.x[0] == pytest.approx(0.1, rel=0.15)


def test_reliability_by_hand() -> None:
    chances = np.array([[0.9, 0.1], [0.85, 0.15], [0.2, 0.8], [0.25, 0.75]])
    found = reliability(chances, np.array([0, 1, 1, 1]))
    assert found.bins == ((pytest.approx(0.125), 0.5, 2), (pytest.approx(0.75), 1.0, 1), (pytest.approx(0.8), 1.0, 1))
    assert found.ece == pytest.approx(0.5 * 0.375 + 0.25 * 0.25 + 0.25 * 0.2)
    assert found.brier == pytest.approx((0.1**2 + 0.85**2 + 0.2**2 + 0.25**2) / 4)


# A probe as a value


def test_a_probe_reads_new_texts_and_comes_back_from_disk(
    llama: LanguageModel, sweep: ProbeSweep, tmp_path: Path
) -> None:
    probe = sweep.at("blocks.1.resid_post").probe
    texts = rows(10, seed=9)
    read = probe.read(llama, texts)
    assert read.shape == (10, 2)
    np.testing.assert_allclose(read.sum(1), 1.0)
    np.testing.assert_allclose(read[:1], probe.read(llama, texts[:1]), rtol=1e-4)
    again = load_probe(probe.save(tmp_path / "p"), llama)
    np.testing.assert_array_equal(again.read(llama, texts), read)
    assert torch.equal(again.direction(), probe.direction())
    assert (again.site, again.classes, again.rule, again.n) == (probe.site, ("low", "up"), "last", 120)
    assert torch.equal(probe.direction("low"), -probe.direction())


def test_a_calibrated_mlp_comes_back_too(llama: LanguageModel, tmp_path: Path) -> None:
    texts = rows(60)
    labels = ["long" if len(t) > 6 else "short" for t in texts]
    found = probe_sweep(
        llama, probe_data(llama, texts, labels), sites="blocks.0.resid_post", kind="mlp", n_folds=3, draws=1,
        with_untrained=False, calibration="isotonic",
    )  # fmt: skip
    probe = found.best.probe
    again = load_probe(probe.save(tmp_path / "p"))
    np.testing.assert_array_equal(again.read(llama, texts), probe.read(llama, texts))
    with pytest.raises(CutawayError, match="no one direction"):
        probe.direction()


def test_another_model_another_width_and_damage_are_refused(
    llama: LanguageModel, sweep: ProbeSweep, tmp_path: Path
) -> None:
    probe = sweep.sites[0].probe
    folder = probe.save(tmp_path / "p")
    with pytest.raises(CutawayError, match="fit it anew for this model"):
        load_probe(folder, untrained(llama))
    narrow = Probe(**{**probe.__dict__, "head": 0, "site": "blocks.0.attn.z"})
    with pytest.raises(CutawayError, match=r"reads 32 numbers per token, but 'blocks.0.*' has 8"):
        narrow.require_model(llama)
    with pytest.raises(CutawayError, match="does not exist"):
        load_probe(tmp_path / "none")
    about = json.loads((folder / "probe.json").read_text())
    for change in ({"site": 3}, {"classes": None}, {"n": "many"}, {"manifest": {}}, {"manifest": None}, {"more": 1}):
        (folder / "probe.json").write_text(json.dumps(about | change))
        with pytest.raises(CutawayError, match="damaged"):
            load_probe(folder)
    (folder / "probe.json").write_text(json.dumps(about))
    assert load_probe(folder).site == about["site"]
    data = (folder / "probe.safetensors").read_bytes()
    (folder / "probe.safetensors").write_bytes(data[:-8] + b"\0" * 8)
    with pytest.raises(CutawayError, match=r"not the file that probe\.json describes"):
        load_probe(folder)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTAWAY_QUIET", "1")
