"""Edits along a probe: what they do is torch's own hook's doing, and a cause is told from what is only readable."""

import numpy as np
import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.observe.probes.data import probe_data, read_site
from cutaway.observe.probes.fitting import choose
from cutaway.observe.probes.sweep import Probe, ProbeSweep, probe_sweep
from cutaway.observe.probes.usage import ACTIONS, Answers, Editor, ProbeUse, answer_tokens, use_in_folds, use_probe

A, B = 20, 30
SITE = "blocks.2.resid_post"  # the last layer of the small models


def difference(logits: torch.Tensor, rows: object) -> torch.Tensor:
    return logits[:, A] - logits[:, B]


@pytest.fixture(scope="module")
def texts(llama: LanguageModel) -> list[list[int]]:
    """Texts of five tokens; the model continues half of them rather with A and half rather with B."""
    drawn = np.random.default_rng(0).integers(2, 97, (600, 5)).tolist()
    score = difference(llama.run(drawn, logits="last").logits[:, 0], None)  # type: ignore[index]
    order = score.argsort().tolist()
    return [drawn[i] for i in [*order[:30], *order[-30:]]]


def sweep_of(lm: LanguageModel, texts: list[list[int]], labels: list[str], **options: object) -> ProbeSweep:
    data = probe_data(lm, texts, labels, **options)  # type: ignore[arg-type]
    return probe_sweep(lm, data, sites=SITE, n_folds=3, draws=1, with_untrained=False)


@pytest.fixture(scope="module")
def causal(llama: LanguageModel, texts: list[list[int]]) -> ProbeSweep:
    """The answer's own sign, read where the answer is made."""
    score = difference(llama.run(texts, logits="last").logits[:, 0], None)  # type: ignore[index]
    return sweep_of(llama, texts, ["up" if s > 0 else "down" for s in score - score.median()])


def test_the_edits_are_those_of_a_raw_hook(llama: LanguageModel, causal: ProbeSweep, texts: list[list[int]]) -> None:
    """Each action at one middle site, written out in a hook on the decoder layer, text by text."""
    site, layer = "blocks.1.resid_post", llama.hf.model.layers[1]  # type: ignore[union-attr,index]
    probe = Probe(**{**causal.best.probe.__dict__, "site": site})
    data = probe_data(llama, [*texts[:5], texts[5][:3]], ["down", "up"] * 3, position=1)
    unit = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)).double(), dim=0)
    other = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)).double(), dim=0)
    editor = Editor(llama, probe, data)
    for action in ACTIONS:
        for source, vector in ((unit, unit), (unit, other)):
            found, size = editor.edited(difference, action, source, vector, 3.0, 0.7)
            sizes = []

            def hook(module, arguments, output, action=action, source=source, vector=vector, sizes=sizes):
                stream = output[0] if isinstance(output, tuple) else output
                x = stream[0, 1].double()
                if action == "ablate":
                    delta = -(x @ source) * vector
                elif action == "ablate, mean":
                    delta = (0.7 - x @ source) * vector
                else:
                    delta = (3.0 if action == "steer +" else -3.0) * vector
                sizes.append(delta.abs().mean().item())
                stream[0, 1] = (x + delta).float()

            handle = layer.register_forward_hook(hook)
            with torch.no_grad():
                oracle = [
                    float(difference(llama.hf(input_ids=data.tokens.ids[i : i + 1, :n]).logits[:, -1], None))
                    for i, n in enumerate(data.tokens.lengths.tolist())
                ]
            handle.remove()
            np.testing.assert_allclose(found, oracle, rtol=1e-4, atol=1e-4)
            assert size == pytest.approx(np.mean(sizes), rel=1e-4)


def test_a_planted_cause_moves_the_answers(llama: LanguageModel, causal: ProbeSweep) -> None:
    found = use_in_folds(llama, causal, SITE, difference, own=False)
    by_action = {row.action: row for row in found.actions}
    for row in found.actions:
        down = row.action != "steer +"
        assert (row.effect.value < 0) == down
        assert abs(row.effect.value) > 3 * max(abs(r) for r in row.random)
        mass, random = row.effect.controls
        assert mass.name == "mean difference"
        assert random.n == 5
        assert row.size[0] == pytest.approx(row.size[2], rel=0.35)  # random displacements are of the probe's size
    assert "steer +" in found.verdict
    assert "not:" not in found.verdict
    assert by_action["steer +"].effect.value == pytest.approx(-by_action["steer −"].effect.value, rel=0.6)
    assert found.n == 60
    assert found.towards == "up"


def test_what_can_only_be_read_moves_nothing(llama: LanguageModel, texts: list[list[int]]) -> None:
    """The second token is in the stream after the last layer, at its own position, where no answer looks any more."""
    second = [40 + i % 2 for i in range(len(texts))]
    changed = [[text[0], token, *text[2:]] for text, token in zip(texts, second, strict=True)]
    sweep = sweep_of(llama, changed, ["even" if token == 40 else "odd" for token in second], position=1)
    assert sweep.best.effect.value > 0.9
    found = use_probe(llama, sweep.best.probe, sweep.data, difference, own=False)
    assert all(row.effect.value == 0.0 for row in found.actions)
    assert all(row.size[0] > 0 for row in found.actions)
    assert found.verdict.startswith("No edit along the probe")


def test_own_answers_and_the_positive_classs_answer_are_the_same_measurement(
    llama: LanguageModel, causal: ProbeSweep
) -> None:
    signs = [1.0 if label == 1 else -1.0 for label in causal.data.labels]

    def own(logits: torch.Tensor, rows) -> torch.Tensor:
        return difference(logits, rows) * torch.tensor([signs[r] for r in rows])

    one = use_probe(llama, causal.best.probe, causal.data, difference, own=False)
    two = use_probe(llama, causal.best.probe, causal.data, own)
    assert [r.effect.value for r in one.actions] == pytest.approx([r.effect.value for r in two.actions])
    assert one.before == pytest.approx(two.before)


def test_no_text_is_edited_along_a_direction_that_it_helped_to_find(
    llama: LanguageModel, causal: ProbeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cutaway.observe.probes.usage as module

    seen: list[tuple[set[bytes], set[bytes]]] = []
    real = module._changes

    def spy(lm, probe, data, metric, features, *rest):
        edited = read_site(lm, [data.tokens.row_ids(int(r)) for r in data.row], SITE)[SITE]
        seen.append(({row.tobytes() for row in features.round(3)}, {row.tobytes() for row in edited.round(3)}))
        return real(lm, probe, data, metric, features, *rest)

    monkeypatch.setattr(module, "_changes", spy)
    use_in_folds(llama, causal, SITE, difference, own=False, draws=1)
    assert len(seen) == 3
    assert all(not fitted & edited for fitted, edited in seen)
    assert sum(len(edited) for _, edited in seen) == 60


def test_one_head_and_a_mean_over_tokens(llama: LanguageModel, texts: list[list[int]]) -> None:
    labels = ["down", "up"] * 30
    one = probe_sweep(
        llama, probe_data(llama, texts, labels, position="mean"), sites="blocks.2.attn.z", head=1, n_folds=3, draws=1,
        with_untrained=False,
    )  # fmt: skip
    found = use_probe(llama, one.best.probe, one.data, difference, own=False, draws=2)
    assert isinstance(found, ProbeUse)
    assert "towards up" in str(found)
    whole = probe_sweep(
        llama, probe_data(llama, texts, labels), sites="blocks.2.attn.z", n_folds=3, draws=1, with_untrained=False
    )  # fmt: skip
    with pytest.raises(CutawayError, match="name a head"):
        use_probe(llama, whole.best.probe, whole.data, difference, own=False)


def test_a_probe_of_another_model_and_a_metric_of_the_wrong_shape_are_refused(
    llama: LanguageModel, causal: ProbeSweep
) -> None:
    from cutaway.observe.random_weights import untrained

    with pytest.raises(CutawayError, match="fit it anew"):
        use_probe(untrained(llama), causal.best.probe, causal.data, difference)
    with pytest.raises(CutawayError, match="one number per text"):
        use_probe(llama, causal.best.probe, causal.data, lambda logits, rows: logits)


def test_a_regression_is_steered_by_its_spread(llama: LanguageModel, texts: list[list[int]]) -> None:
    score = difference(llama.run(texts, logits="last").logits[:, 0], None).tolist()  # type: ignore[index]
    data = probe_data(llama, texts, score, regression=True)
    features = read_site(llama, texts, SITE)[SITE]
    weights, *_ = choose("ridge", features, data.labels, data.groups, None)
    probe = Probe(SITE, None, "last", "ridge", None, weights, llama.identity(), 60)
    found = use_probe(llama, probe, data, difference)
    up = next(row for row in found.actions if row.action == "steer +")
    assert up.effect.value > 3 * max(abs(r) for r in up.random)
    assert found.towards is None


def test_answers_are_the_tokens_that_follow(atlas: LanguageModel) -> None:
    texts = ["The capital of France is", "The capital of Italy is"]
    found = answer_tokens(atlas, texts, [" Paris", " Rome"], [" Rome", " Paris"])
    assert isinstance(found, Answers)
    assert atlas.token_strings(found.answer) == [" Paris", " Rome"]
    logits = atlas.run(texts, logits="last").logits
    assert logits is not None
    expected = [float(logits[0, 0, found.answer[0]] - logits[0, 0, found.answer[1]])]
    assert found(logits[:, 0], [0, 1])[:1].tolist() == pytest.approx(expected)
    chance = answer_tokens(atlas, texts, [" Paris", " Rome"])
    assert chance.units == "probability of the answer"
    np.testing.assert_allclose(
        chance(logits[:, 0], [0, 1]).numpy(), logits[[0, 1], 0].softmax(-1)[[0, 1], list(found.answer)].numpy()
    )
    with pytest.raises(CutawayError, match="begin with the same token"):
        answer_tokens(atlas, texts, [" Paris", " Rome"], [" Paris", " Paris"])
    with pytest.raises(CutawayError, match="2 texts but 1 answers"):
        answer_tokens(atlas, texts, [" Paris"])
