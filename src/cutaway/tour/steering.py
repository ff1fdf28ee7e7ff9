"""The tour's steps that change the model: a direction removed and added, a latent held high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_safetensors
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.causal.task_results import TaskResult
from cutaway.draw import blocks as page
from cutaway.model.edits.edits import Edit
from cutaway.model.tokens import Tokens
from cutaway.steering.directions import (
    Direction,
    ablate_direction,
    add_direction,
    clamp_to_negative,
    describe,
    difference_of_means,
)
from cutaway.steering.evaluation import SteeringResult, evaluate_steering
from cutaway.steering.latents import Concept, Doses, LatentSteering, SimilarLatents, steer_latent
from cutaway.steering.replies import Judging, judged
from cutaway.steering.selection import Selection, select_direction
from cutaway.steering.side_effects import side_effects_of
from cutaway.subjects.world.items.sets import item_sets
from cutaway.tour.context import LEAST_RIGHT, Tour, neutral_rows
from cutaway.tour.dictionary import Matched, matched, trained_dictionary
from cutaway.tour.world_tasks import GENERAL_CONCEPTS, LANDMARKS, OPEN_PROMPTS

_TEST = 40
_FIT = 320  # from fewer requests the direction is a matter of luck (docs/atlas.md)
_CHOOSE = 40
_LEAST_AUROC = 0.8
_CONTRASTS = ("pronoun", "subject–verb agreement", "determiner–noun agreement", "reflexive agreement", "closing quote")


def _about(tour: Tour, name: str, title: str, question: str, lead: str) -> dict[str, Any]:
    return {"id": name, "title": title, "question": question, "lead": lead, "command": tour.command(name)}


def steering(tour: Tour) -> page.Section:
    """Remove and add a direction: refusal where the model chats and refuses, else a contrast it knows."""
    chats = _refusal_prompts(tour)
    if chats is not None:
        return _refusal(tour, *chats)
    for task in tour.tried:
        if task.able and task.task.name in _CONTRASTS:
            return _contrast(tour, task)
    about = _about(
        tour,
        "steering",
        "Steering along a direction",
        "Can behaviour be switched by one direction?",
        "The difference of mean activations between two kinds of prompts is removed from the model, or added to it.",
    )
    return page.Section(**about, status="not shown", note=tour.not_able())


def _refusal_prompts(tour: Tour) -> tuple[dict[str, Tokens], float, float] | None:
    """Harmful and harmless requests (to read from, to choose on, to test on), if the model refuses and answers them."""
    lm = tour.lm
    if lm.tokenizer is None or getattr(lm.tokenizer, "chat_template", None) is None:
        return None
    sets = item_sets(tour.seed, 400)
    prompts = {}
    for kind in ("harmful", "harmless"):
        seen = [item.chat for item in sets[f"refusal/{kind}/seen_action"].items]
        test = [item.chat for item in sets[f"refusal/{kind}/held_out_action"].items]
        parts = {"fit": seen[:_FIT], "choose": seen[_FIT : _FIT + _CHOOSE], "test": test[:_TEST]}
        for part, chosen in parts.items():
            conversations = [[{"role": m.role, "content": m.content} for m in chat or ()] for chat in chosen]
            prompts[f"{kind} {part}"] = lm.chat_tokens(conversations)
    refused = judged(lm, prompts["harmful test"], max_new_tokens=6).rate("refused")
    answered = judged(lm, prompts["harmless test"], max_new_tokens=6).rate("answered")
    return (prompts, refused, answered) if min(refused, answered) >= LEAST_RIGHT else None


def _refusal(tour: Tour, prompts: dict[str, Tokens], refused: float, answered: float) -> page.Section:
    lm = tour.lm
    command = tour.command("steering")
    directions = difference_of_means(lm, prompts["harmful fit"], prompts["harmless fit"])
    choice = select_direction(lm, directions, prompts["harmful choose"], prompts["harmless choose"])
    neutral = neutral_rows(tour)
    tests = [
        ("ablate", "harmful", "zero-ablated at every write", lambda d: ablate_direction(lm, d)),
        ("clamp", "harmful", "clamped to the harmless mean", lambda d: clamp_to_negative(lm, d)),
        ("add ×2", "harmless", "added twice", lambda d: add_direction(d, 2.0)),
    ]
    results: list[tuple[str, str, SteeringResult]] = []
    for method, kind, words, apply in tests:
        best = choice.best(method).direction
        with recording(command):
            result = evaluate_steering(
                lm,
                prompts[f"{kind} test"],
                best,
                apply,
                method=f"{kind} requests, direction {words}",
                neutral=neutral,
                judging=Judging(max_new_tokens=12),
                controls=(0, 1),
            )
        results.append((kind, words, result))
    vectors = {f"{kind} {words}": r.direction.vector for kind, words, r in results}
    write_safetensors(tour.folder.path / "directions.safetensors", vectors)
    clamp = results[1][2]
    null = _null(results)
    return page.Section(
        **_about(
            tour,
            "steering",
            "Steering along a direction",
            "Can refusal be switched off, and on?",
            "The difference between mean activations on harmful and harmless requests gives a direction. It is "
            "removed while the model reads harmful requests, and added while it reads harmless ones, beside random "
            "directions.",
        ),
        note=(
            f"Unsteered, {refused:.0%} of harmful requests are refused and {answered:.0%} of harmless ones answered (n "
            f"{_TEST} each, actions never asked about in training). Position, layer and method were chosen on other "
            "requests. Replies "
            "are judged by their first words, so an answer may still be wrong."
            + (f" Null result: {'; '.join(null)}." if null else "")
        ),
        status="no effect" if len(null) == len(results) else "shown",
        blocks=(
            page.Figures(
                items=(
                    page.Figure(
                        label="harmful answered, clamped",
                        value=clamp.steered.rate("answered"),
                        units="share",
                        detail=f"layer {clamp.direction.layer}, {describe(clamp.direction.position)}",
                    ),
                    page.Figure(
                        label="harmful answered, zero-ablated",
                        value=results[0][2].steered.rate("answered"),
                        units="share",
                        detail=f"layer {results[0][2].direction.layer}, {describe(results[0][2].direction.position)}",
                    ),
                    page.Figure(
                        label="harmless refused, added",
                        value=results[2][2].steered.rate("refused"),
                        units="share",
                        detail=f"layer {results[2][2].direction.layer}, {describe(results[2][2].direction.position)}",
                    ),
                )
            ),
            *(_bars(kind, words, result) for kind, words, result in results),
            *(_texts(prompts[f"{kind} test"], words, result) for kind, words, result in results),
            _side_effects([(words, result) for _, words, result in results]),
            _map(tour, choice),
        ),
        effects=tuple(
            result.effects["answered" if kind == "harmful" else "refused"].to_json() for kind, _, result in results
        ),
    )


def _null(results: Sequence[tuple[str, str, SteeringResult]]) -> list[str]:
    """Which methods did nothing that random directions do not do, each in a sentence."""
    failed = []
    for kind, words, result in results:
        label = "answered" if kind == "harmful" else "refused"
        effect = result.effects[label]
        top = max((c.interval or (c.value, c.value))[1] for c in effect.controls)
        if effect.interval is None or effect.interval[0] <= top:
            failed.append(f"the direction {words} does not move {kind} requests beyond its controls")
    return failed


def _bars(kind: str, words: str, result: SteeringResult) -> page.Bars:
    items = []
    for label in ("refused", "answered"):
        effect = result.effects[label]
        low, high = effect.interval or (None, None)
        items.append(page.Bar(label=f"{label}, steered", value=effect.value, low=low, high=high))
        for control in effect.controls:
            low, high = control.interval or (None, None)
            name = f"{label}, {control.name}"
            items.append(page.Bar(label=name, value=control.value, low=low, high=high, control=True))
    return page.Bars(
        items=tuple(items), units="share of replies", caption=f"{kind.capitalize()} requests, direction {words}."
    )


def _texts(prompts: Tokens, words: str, result: SteeringResult) -> page.Compare:
    """Replies to the first prompt, side by side."""
    question = prompts.text(0)
    items = (
        page.Continuation(label="unsteered", text=result.unsteered.texts[0], note=result.unsteered.labels[0]),
        page.Continuation(label=words, text=result.steered.texts[0], note=result.steered.labels[0]),
        page.Continuation(
            label="random direction", text=result.random[0].texts[0], note=result.random[0].labels[0], control=True
        ),
    )
    return page.Compare(items=items, prompt=question)


def _side_effects(results: Sequence[tuple[str, SteeringResult]]) -> page.Table:
    rows = []
    for words, result in results:
        assert result.side_effects is not None
        random = sum(p.kl for p in result.random_side_effects) / len(result.random_side_effects)
        low, high = result.side_effects.interval
        rows.append((words, round(result.side_effects.kl, 3), interval_text((low, high), to=True), round(random, 3)))
    return page.Table(
        columns=("edit", "KL, nats per token", "95 % interval", "random directions"),
        rows=tuple(rows),
        caption=(
            "Side effects: how far the edit moves the model's predictions on held-out text where it should do nothing."
        ),
    )


def _map(tour: Tour, choice: Selection) -> page.Heatmap:
    """Log-odds of refusing after removing each candidate by the clamp: which layer and position work."""
    found = [c for c in choice.candidates if c.method == "clamp"]
    positions = list(dict.fromkeys(c.direction.position for c in found))
    values = [
        [next(c.score for c in found if c.direction.layer == layer and c.direction.position == p) for p in positions]
        for layer in range(tour.lm.n_layers)
    ]
    return page.Heatmap(
        rows=tuple(f"layer {layer}" for layer in range(tour.lm.n_layers)),
        columns=tuple(describe(p) for p in positions),
        values=tuple(map(tuple, values)),
        diverging=True,
        units="log-odds",
        caption=(
            "Log-odds of a refusing first word on harmful requests with the direction of each layer and position "
            f"clamped; unsteered {choice.positive_score:+.1f}, harmless requests {choice.negative_score:+.1f}."
        ),
        row_axis="direction from",
        column_axis="position",
    )


def _contrast(tour: Tour, task: TaskResult) -> page.Section:
    """Steer between the two sides of a task that the model can do: clean's answer on corrupt prompts."""
    lm, pairs = tour.lm, task.pairs
    assert pairs is not None
    command = tour.command("steering")
    by_answer: dict[tuple[int, int], list[int]] = {}
    for row in range(len(pairs)):
        by_answer.setdefault((int(pairs.answer[row]), int(pairs.wrong[row])), []).append(row)
    answer, wrong = max(by_answer, key=lambda key: len(by_answer[key]) + len(by_answer.get((key[1], key[0]), [])))
    # every pair of the two answers, turned so that the first side is the same everywhere
    first = [pairs.clean.row_ids(r) for r in by_answer[answer, wrong]]
    second = [pairs.corrupt.row_ids(r) for r in by_answer[answer, wrong]]
    first += [pairs.corrupt.row_ids(r) for r in by_answer.get((wrong, answer), [])]
    second += [pairs.clean.row_ids(r) for r in by_answer.get((wrong, answer), [])]
    names = [s.strip() for s in lm.token_strings([answer, wrong])]
    about = _about(
        tour,
        "steering",
        "Steering along a direction",
        f"Can “{names[1]}” be turned into “{names[0]}”?",
        f"The difference between mean activations on prompts that go on with “{names[0]}” and with “{names[1]}” is "
        "added to the second kind, beside random directions of the same length.",
    )
    if len(first) < 12:
        note = f"not shown: {len(first)} prompt pairs for “{names[0]}” against “{names[1]}” are too few; 12 are needed."
        return page.Section(**about, status="not shown", note=note)
    third = len(first) // 3
    directions = difference_of_means(lm, lm.tokens(first[:third]), lm.tokens(second[:third]), positions=(-1,))
    choose, test = lm.tokens(second[third : 2 * third]), lm.tokens(second[2 * third :])

    def difference(prompts: Tokens, edits: Sequence[Edit]) -> torch.Tensor:
        logits = lm.run(prompts, edits=edits, logits="last").last_logits
        return (logits[:, answer] - logits[:, wrong]).float().cpu()

    neutral = neutral_rows(tour)
    best = max(directions, key=lambda d: float(difference(choose, add_direction(d, 1.0)).mean()))
    plain = difference(test, ())
    doses, effects = (0.5, 1.0, 2.0), []
    rows: list[tuple[Any, ...]] = []
    for dose in doses:
        steered = difference(test, add_direction(best, dose))
        random = [difference(test, add_direction(best.random(seed), dose)).mean().item() for seed in range(5)]
        effects.append(
            Effect(
                name=f"direction added ×{dose:g}",
                value=float(steered.mean()),
                n=len(steered),
                interval=bootstrap_interval(steered.numpy()),
                controls=(
                    Control("unsteered", float(plain.mean()), bootstrap_interval(plain.numpy()), len(plain)),
                    Control("random directions", sum(random) / len(random), bootstrap_interval(random), len(random)),
                ),
                ablation="add",
                units=f"logit of {names[0]} above {names[1]}",
                command=command,
            )
        )
        cost, random_cost = (
            side_effects_of(lm, neutral, add_direction(best, dose)),
            side_effects_of(lm, neutral, add_direction(best.random(0), dose)),
        )
        flipped = float((steered > 0).float().mean())
        rows.append((f"×{dose:g}", round(flipped, 3), round(cost.kl, 3), round(random_cost.kl, 3)))
    status, note = tour.chosen(task)
    return page.Section(
        **about,
        status="fallback",
        note=f"{note} The model has no chats in which it refuses, so a contrast that it knows is steered."
        if status
        else note,
        blocks=(
            page.Figures(
                items=(
                    page.Figure(label=f"“{names[0]}” instead of “{names[1]}” at ×1", value=rows[1][1], units="share"),
                    page.Figure(
                        label="unsteered",
                        value=round(float((plain > 0).float().mean()), 3),
                        units="share",
                        control=True,
                    ),
                )
            ),
            *(page.EffectBlock(effect=effect.to_json()) for effect in effects),
            page.Table(
                columns=("dose", "answers flipped", "KL, nats per token", "KL, random direction"),
                rows=tuple(rows),
                caption="Answers flipped on held-out prompts, and the side effects on held-out text.",
            ),
            _continuations(tour, test, best, names),
        ),
    )


def _continuations(tour: Tour, prompts: Tokens, direction: Direction, names: list[str]) -> page.Compare:
    lm = tour.lm
    texts = [
        lm.generate(prompts[[0]], max_new_tokens=12, edits=edits).texts[0]
        for edits in ((), add_direction(direction, 1.0), add_direction(direction.random(0), 1.0))
    ]
    labels = ("unsteered", "direction added", "random direction")
    return page.Compare(
        prompt=prompts.text(0),
        items=tuple(
            page.Continuation(label=label, text=text, control=i == 2, highlight=tuple(names))
            for i, (label, text) in enumerate(zip(labels, texts, strict=True))
        ),
    )


def clamping(tour: Tour) -> page.Section:
    """Hold one latent high and see whether the model speaks of what it stands for."""
    lm = tour.lm
    about = _about(
        tour,
        "clamping",
        "Holding one latent high",
        "Does the model speak of what a latent stands for, when it is held high?",
        "A latent that tells a known entity is clamped at multiples of its largest activation, beside latents "
        "that fire as often. Watched: the probability of the entity's word on prompts that do not mention it.",
    )
    learned = trained_dictionary(tour)
    found, density = matched(tour)
    picked = _steerable(found)
    if picked is None:
        note = "not shown: no entity that could be watched has a latent with AUROC of 0.8 or more in this text."
        return page.Section(**about, status="not shown", note=note)
    match, words, prompts = picked
    ids = [int(lm.tokens(f" {word}", bos=False).ids[0, 0]) for word in words]
    try:
        with recording(about["command"]):
            result = steer_latent(
                lm,
                learned,
                match.latent,
                list(prompts),
                Concept(tuple(ids), " or ".join(words[:3])),
                doses=Doses(match.maximum),
                controls=SimilarLatents(density, seed=tour.seed),
                neutral=neutral_rows(tour, n=8),
            )
    except CutawayError as error:
        return page.Section(**about, status="not shown", note=f"not shown: {error}")
    return _clamping(about, match, words, result)


def _steerable(found: list[Matched]) -> tuple[Matched, tuple[str, ...], tuple[str, ...]] | None:
    """The landmark whose latent is its own most (by precision) and its city; else the best matched entity that has
    words which can be watched."""
    landmarks = [t for t in found if t.concept in LANDMARKS and t.auroc >= _LEAST_AUROC]
    if landmarks:
        best = max(landmarks, key=lambda t: t.precision)
        return best, (LANDMARKS[best.concept],), OPEN_PROMPTS
    usable = [t for t in found if t.concept in GENERAL_CONCEPTS and t.auroc >= _LEAST_AUROC]
    if not usable:
        return None
    prompts = ("Once upon a time, there was a", "One day, the", "He said that", "They went to the", "It was", "The")
    return usable[0], GENERAL_CONCEPTS[usable[0].concept], prompts


def _clamping(about: dict[str, Any], match: Matched, words: tuple[str, ...], result: LatentSteering) -> page.Section:
    moved = result.moved
    doses = result.doses
    strongest = max(doses, key=lambda dose: dose.effect.value)
    note = (
        f"Latent {match.latent} tells “{match.concept}” with AUROC {match.auroc:.2f} (precision "
        f"{match.precision:.2f}). "
        + (
            f"At ×{moved.multiple:g} the probability lies above all controls."
            if moved is not None
            else "Null result: at no dose does the probability lie above its controls with its whole interval."
        )
    )
    return page.Section(
        **about,
        status="no effect" if moved is None else "shown",
        note=note,
        blocks=(
            page.Figures(
                items=(
                    page.Figure(
                        label=f"P({words[0]}), latent clamped" + ("" if moved is not None else " (null result)"),
                        value=strongest.effect.value,
                        detail=f"at ×{strongest.multiple:g} its maximum, mean of {strongest.effect.n} prompts",
                    ),
                    page.Figure(
                        label=f"P({words[0]}), unsteered", value=strongest.effect.controls[0].value, control=True
                    ),
                )
            ),
            page.Line(
                series=(
                    page.Series(
                        name="latent clamped",
                        x=tuple(d.multiple for d in doses),
                        y=tuple(d.effect.value for d in doses),
                        low=tuple((d.effect.interval or (None, None))[0] for d in doses),
                        high=tuple((d.effect.interval or (None, None))[1] for d in doses),
                    ),
                    page.Series(
                        name=doses[0].effect.controls[1].name,
                        x=tuple(d.multiple for d in doses),
                        y=tuple(d.effect.controls[1].value for d in doses),
                        control=True,
                    ),
                ),
                x_label="multiple of the latent's largest activation",
                y_label=f"P({', '.join(words[:3])})",
                caption="Probability of the entity's word as the next token, by dose.",
            ),
            page.EffectBlock(effect=(moved or strongest).effect.to_json()),
            page.Compare(
                prompt=result.prompts[0],
                items=(
                    page.Continuation(label="unsteered", text=result.unsteered_text, highlight=words),
                    page.Continuation(
                        label=f"clamped at ×{(moved or strongest).multiple:g}",
                        text=(moved or strongest).text,
                        highlight=words,
                    ),
                    page.Continuation(
                        label="random latent, same value",
                        text=(moved or strongest).random_text,
                        control=True,
                        highlight=words,
                    ),
                ),
            ),
            page.Table(
                columns=("dose", "probability", "random latents", "KL, nats per token", "KL, random latents"),
                rows=tuple(
                    (
                        f"×{d.multiple:g}",
                        round(d.effect.value, 4),
                        round(d.effect.controls[1].value, 4),
                        None if d.side_effects is None else round(d.side_effects.kl, 3),
                        None if d.random_kl is None else round(d.random_kl, 3),
                    )
                    for d in doses
                ),
                caption="The side effects on held-out text, by dose.",
            ),
        ),
    )
