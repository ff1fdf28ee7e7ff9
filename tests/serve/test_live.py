"""What the live page is told: the library's own figures, and a program that makes them again."""

import threading
from typing import Any

import pytest
import torch
from live_page import CAPITALS, PATCH, Ask

import cutaway
from cutaway.model.language_model import LanguageModel
from cutaway.observe import attribute, logit_lens
from cutaway.serve.live import DRAWS, LiveModel, counterparts, noise_like
from cutaway.serve.wire import Change, Question, Trial

CLICKS = [
    [PATCH],
    [{"kind": "patch", "site": "blocks.2.attn.z", "head": 7}],
    [{"kind": "mean", "site": "blocks.2.attn.z", "head": 7, "position": 8}],
    [{"kind": "mean", "site": "blocks.0.resid_pre", "position": 7}],
    [{"kind": "zero", "site": "blocks.4.mlp.out"}],
    [{"kind": "cut", "site": "blocks.2.attn.pattern", "head": 7, "position": 8, "key": 7}],
    [PATCH, {"kind": "zero", "site": "blocks.4.mlp.out", "position": 8}],
]


def test_a_text_is_read_as_the_instruments_read_it(ask: Ask, atlas: LanguageModel) -> None:
    found = ask("read", **CAPITALS)
    assert [token["shown"] for token in found["tokens"]][-2:] == ["·Dallas", "·is"]
    assert (found["answer"]["shown"], found["rival"]["shown"]) == ("·Austin", "·Sacramento")
    lens = logit_lens(atlas, CAPITALS["text"])
    assert [[[one["id"] for one in cell] for cell in row] for row in found["lens"]["top"]] == lens.top_ids[
        :, 0
    ].tolist()
    assert found["answers"][0]["p"] == pytest.approx(float(lens.top_probability[-1, 0, -1, 0]))
    parts = found["parts"]
    shares = attribute(atlas, CAPITALS["text"], " Austin", " Sacramento", by="head")
    assert parts["values"][2][7] == pytest.approx(float(shares.by_layer("head")[2, 7]))
    assert sum(map(sum, parts["values"])) + parts["rest"] == pytest.approx(parts["total"], abs=1e-4)
    assert parts["total"] == pytest.approx(found["difference"], abs=1e-4)
    assert (parts["columns"][-1], parts["sites"][3][-1], parts["heads"][3][-1]) == ("MLP", "blocks.3.mlp.out", None)
    assert all(control > 0 for row in parts["controls"] for control in row)


def test_a_patch_turns_the_answer_and_noise_of_its_size_does_not(ask: Ask) -> None:
    found = ask("change", **CAPITALS, changes=[PATCH])
    assert max(found["answers"], key=lambda one: one["after"])["shown"] == "·Sacramento"
    assert max(found["answers"], key=lambda one: one["before"])["shown"] == "·Austin"
    shift = found["difference"]
    assert shift["before"] > 0 > shift["after"]
    assert shift["control_low"] <= shift["control"] <= shift["control_high"]
    assert shift["control"] > shift["after"] + 3
    assert shift["draws"] == DRAWS
    assert found["touched"][0]["tokens"] == 1
    assert found["lens"]["top"][-1][-1][0]["shown"] == "·Sacramento"


def test_the_control_is_as_large_as_the_edit_and_in_its_place(atlas: LanguageModel) -> None:
    edit = cutaway.zero("blocks.2.resid_post", positions=[5, 8])
    edited = atlas.run(CAPITALS["text"], edits=[edit], logits=None).receipts[0]
    noise = atlas.run([CAPITALS["text"]] * DRAWS, edits=[noise_like(edited)], logits=None).receipts[0]
    assert noise.mean_abs_delta == pytest.approx(edited.mean_abs_delta, rel=0.05)  # 4,096 values, s.e. 1.2 %
    assert [list(row) for row in noise.positions] == [[5, 8]] * DRAWS


@pytest.mark.parametrize("changes", CLICKS, ids=lambda changes: " ".join(one["kind"] for one in changes))
def test_the_program_makes_the_same_answer(ask: Ask, atlas: LanguageModel, monkeypatch: Any, changes: Any) -> None:
    found = ask("change", **CAPITALS, changes=changes)
    assert all(one["mean_abs_delta"] > 0 for one in found["touched"])
    monkeypatch.setattr(cutaway, "load", lambda name: {"atlas": atlas}[name], raising=False)
    names: dict[str, Any] = {}
    exec(found["python"], names)
    chances = names["run"].last_logits[0].softmax(-1)
    for one in found["answers"]:
        assert float(chances[one["id"]]) == pytest.approx(one["after"], abs=1e-6)
    lens = found["lens"]["top"][-1][-1][0]
    assert lens["id"] == int(chances.argmax())


def test_the_program_loads_a_model_by_its_path(ask: Ask, atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "name", "my-gpt")
    monkeypatch.setattr(atlas, "loaded_from", "/home/x/models/my-gpt")
    assert "lm = cutaway.load('/home/x/models/my-gpt')" in ask("change", **CAPITALS, changes=[PATCH])["python"]


def test_a_cut_look_is_gone_from_the_pattern(ask: Ask) -> None:
    cut = {"kind": "cut", "site": "blocks.2.attn.pattern", "head": 7, "position": 8, "key": 7}
    before = ask("look", **CAPITALS, changes=[], layer=2, head=7)["values"]
    after = ask("look", **CAPITALS, changes=[cut], layer=2, head=7)["values"]
    assert before[8][7] > 0.5
    assert after[8][7] == 0
    assert after[7] == before[7]
    assert len(before) == 9
    assert before[0][1] == 0


def test_a_pattern_is_looked_at_under_edits_of_later_layers(ask: Ask) -> None:
    later = {"kind": "zero", "site": "blocks.4.mlp.out"}
    cut = {"kind": "cut", "site": "blocks.2.attn.pattern", "head": 7, "position": 8, "key": 7}
    assert ask("look", **CAPITALS, changes=[later, cut], layer=2, head=7)["values"][8][7] == 0
    plain = ask("look", **CAPITALS, changes=[], layer=2, head=7)
    assert ask("look", **CAPITALS, changes=[later], layer=2, head=7) == plain


def test_an_edit_that_changes_nothing_says_so(ask: Ask) -> None:
    found = ask("change", **CAPITALS, changes=[{**PATCH, "position": 3}])
    assert found["touched"][0]["mean_abs_delta"] == 0
    assert found["difference"]["after"] == pytest.approx(found["difference"]["before"], abs=1e-5)


@pytest.mark.parametrize(
    ("ids", "others", "found"),
    [
        ([1, 2, 3, 4], [1, 9, 3, 4], [0, 1, 2, 3]),
        ([1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3]),
        ([1, 2, 5, 3], [1, 9, 3], [0, None, 1, 2]),
        ([1, 9, 3], [1, 2, 5, 3], [0, 2, 3]),
        ([1, 3], [1, 2, 3], [0, 2]),
        ([1, 2, 3], [1, 3], [0, None, 1]),
        ([7], [8], [0]),
    ],
)
def test_tokens_have_their_counterparts(ids: list[int], others: list[int], found: list[int | None]) -> None:
    assert counterparts(ids, others) == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "patch", "site": "blocks.1.resid_post", "position": 99}, "There is no token 99; the text has 9"),
        ({"kind": "zero", "site": "blocks.99.resid_post"}, "layer"),
        ({"kind": "zero", "site": "blocks.1.nonsense"}, "There is no site"),
        ({"kind": "zero", "site": "blocks.1.attn.z", "head": 8}, "There is no head 8"),
        ({"kind": "cut", "site": "blocks.1.attn.z", "head": 1, "position": 1, "key": 0}, "A cut names a pattern"),
        ({"kind": "cut", "site": "blocks.1.attn.pattern", "head": 1, "position": 1, "key": 50}, "There is no token 50"),
        ({"kind": "mean", "site": "blocks.1.attn.pattern"}, "A mean is over"),
    ],
)
def test_an_edit_that_does_not_fit_is_one_sentence(client: Any, change: Any, says: str) -> None:
    done = client.post("/api/change", json={**CAPITALS, "changes": [change]})
    assert done.status_code == 422
    assert says in done.json()["error"]


def test_a_token_without_counterpart_is_not_patched(client: Any) -> None:
    texts = {"text": CAPITALS["text"], "other": "The capital of the state containing the old Oakland is"}
    done = client.post("/api/change", json={**texts, "changes": [{**PATCH, "position": 6}]})
    assert done.status_code == 200  # "containing" stands in both
    alone = {"text": CAPITALS["text"], "changes": [PATCH]}
    assert client.post("/api/change", json=alone).json()["error"].startswith("There is nothing to patch from")


def test_the_answer_can_be_named(ask: Ask, client: Any) -> None:
    found = ask("read", **CAPITALS, answer=" Lansing", rival=" Austin")
    assert (found["answer"]["shown"], found["rival"]["shown"]) == ("·Lansing", "·Austin")
    assert found["difference"] < 0
    assert "tokens of atlas" in client.post("/api/read", json={**CAPITALS, "answer": " Xyzzyx"}).json()["error"]


def test_two_that_ask_at_once_do_not_cross(atlas: LanguageModel) -> None:
    live = LiveModel(atlas)
    asked = [
        Trial(**CAPITALS, changes=[Change(**PATCH)]),
        Trial(text="The opposite of hot is", other="The opposite of big is", changes=[]),
    ]
    alone = [live.change(one) for one in asked]
    found: dict[int, list[Any]] = {0: [], 1: []}

    def repeat(which: int) -> None:
        for _ in range(4):
            found[which].append(live.change(asked[which]))

    threads = [threading.Thread(target=repeat, args=(which,)) for which in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, outcomes in found.items():
        assert len(outcomes) == 4
        for one in outcomes:
            assert one.python == alone[which].python
            assert [a.id for a in one.answers] == [a.id for a in alone[which].answers]
            assert one.difference.after == pytest.approx(alone[which].difference.after, abs=1e-4)


def test_a_model_without_known_words_is_read_too(tiny: LanguageModel) -> None:
    live = LiveModel(tiny)
    found = live.read(Question(text="w3 w4 w5 w6", other="w3 w9 w5 w6"))
    assert found.aligned == list(range(len(found.tokens)))
    outcome = live.change(
        Trial(text="w3 w4 w5", changes=[Change(kind="zero", site="blocks.1.attn.z", head=3, position=1)])
    )
    edits = cutaway.zero("blocks.1.attn.z", heads=3, positions=1)
    after = tiny.run("w3 w4 w5", edits=edits, logits="last").last_logits[0].softmax(-1)
    for one in outcome.answers:
        assert one.after == pytest.approx(float(after[one.id]), abs=1e-6)


def test_nothing_stays_behind(atlas: LanguageModel, ask: Ask) -> None:
    before = atlas.run(CAPITALS["text"], logits="last").last_logits
    ask("change", **CAPITALS, changes=[PATCH])
    assert torch.equal(atlas.run(CAPITALS["text"], logits="last").last_logits, before)
