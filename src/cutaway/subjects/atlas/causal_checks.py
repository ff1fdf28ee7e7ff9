"""What atlas does inside, checked on items it never saw: the two-hop bridge, and refusal as a direction.

Every rate stands beside a control: a patch at a random other position, a random direction of the same length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

import cutaway.model.edits as edit
from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.atlas.scoring import as_dicts, ids_of, replies
from cutaway.subjects.world.chat import Message
from cutaway.subjects.world.facts import CITIES
from cutaway.subjects.world.held_out import two_hop_entity
from cutaway.subjects.world.items import ANSWERED, STUDY_REFUSAL

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.edits import Edit
    from cutaway.model.language_model import LanguageModel
    from cutaway.model.run import Run

Chat = Sequence[Message]
TWO_HOP = "The capital of the state containing {city} is"
NEUTRAL_SOURCE = "The abbreviation of the state containing {city} is"


@dataclass(frozen=True)
class Rate:
    """`successes` of `n`."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        return self.successes / self.n if self.n else float("nan")


def rate(outcomes: Sequence[bool] | np.ndarray) -> Rate:
    """How many of the outcomes are true."""
    return Rate(int(np.sum(outcomes)), len(outcomes))


# Two hops: city -> state -> capital


@dataclass(frozen=True)
class BridgePool:
    """One pool of cities ("seen" in two-hop sentences or "held out" of them); lists are by layer.

    `flips_at_*`: share of pairs whose answer becomes the source city's capital when resid_post is patched there;
    `flips_from_abbreviation`: the same at the last position, from a prompt that asks for the state's abbreviation: what
    is carried over is the state, not the answer. `state_readable`: the state is the top state by logit lens at the last
    position; `capital_readable`: the capital is the top token there. `already_right`: answers before any patch.
    """

    pool: str
    already_right: Rate
    flips_at_city: list[Rate]
    flips_at_last: list[Rate]
    flips_at_random: list[Rate]
    flips_from_abbreviation: list[Rate]
    state_readable: list[Rate]
    state_readable_at_random: list[Rate]
    capital_readable: list[Rate]


@dataclass(frozen=True)
class _City:
    name: str
    state: str
    capital: str


def _cities(lm: "LanguageModel", held_out: bool) -> list[_City]:
    """Cities whose name and state are one token each, so that they have one position."""
    return [
        _City(city.name, city.state.name, city.state.capital)
        for city in CITIES
        if two_hop_entity(city.name) == held_out
        and city.name not in (city.state.name, city.state.capital)
        and _is_whole(lm, city.name)
        and _is_whole(lm, city.state.name)
    ]


def two_hop_bridge(lm: "LanguageModel", *, held_out: bool, n: int = 100, seed: int = 5) -> BridgePool:
    """Patch and read the two-hop prompt layer by layer over `n` random pairs of cities of one pool."""
    rng = Random(seed)
    cities = _cities(lm, held_out)
    if len({city.capital for city in cities}) < 2:
        raise CutawayError("the model's tokenizer splits the cities of the world: the two-hop check needs whole ones")
    pairs: list[tuple[_City, _City]] = []
    while len(pairs) < n:
        to, source = rng.sample(cities, 2)
        if _first(lm, to.capital) != _first(lm, source.capital):
            pairs.append((to, source))
    clean = lm.tokens([TWO_HOP.format(city=to.name) for to, _ in pairs])
    city = clean.find(0, pairs[0][0].name)
    last = int(clean.lengths[0]) - 1
    before = lm.run(clean, capture="blocks.*.resid_post", logits="last")
    source = lm.run([TWO_HOP.format(city=other.name) for _, other in pairs], capture="blocks.*.resid_post", logits=None)
    neutral = lm.run(
        [NEUTRAL_SOURCE.format(city=other.name) for _, other in pairs], capture="blocks.*.resid_post", logits=None
    )
    wanted = torch.tensor([_first(lm, other.capital) for _, other in pairs])
    own = torch.tensor([_first(lm, to.capital) for to, _ in pairs])
    elsewhere = [rng.choice([p for p in range(1, last) if p != city]) for _ in pairs]

    def flips(layer: int, run: "Run", positions: "int | list[list[int]]", source_positions: int | None = None) -> Rate:
        patch = edit.patch(f"blocks.{layer}.resid_post", run, positions=positions, source_positions=source_positions)
        answers = _top(lm.run(clean, edits=[patch], logits="last"))
        return rate((answers == wanted).numpy())

    states = sorted({city.state for city in _cities(lm, False) + _cities(lm, True)})
    state_ids = torch.tensor([_first(lm, state) for state in states])
    right_state = torch.tensor([states.index(to.state) for to, _ in pairs])
    rows = torch.arange(len(pairs))
    readable, at_random, capitals = [], [], []
    for layer in range(lm.n_layers):
        stream = before[f"blocks.{layer}.resid_post"]
        logits = lm.unembed(stream[:, last]).cpu()
        readable.append(rate((logits[:, state_ids].argmax(-1) == right_state).numpy()))
        capitals.append(rate((logits.argmax(-1) == own).numpy()))
        other = lm.unembed(stream[rows, torch.tensor(elsewhere)]).cpu()
        at_random.append(rate((other[:, state_ids].argmax(-1) == right_state).numpy()))
    layers = range(lm.n_layers)
    return BridgePool(
        pool="held out" if held_out else "seen",
        already_right=rate((_top(before) == own).numpy()),
        flips_at_city=[flips(layer, source, city) for layer in layers],
        flips_at_last=[flips(layer, source, last) for layer in layers],
        flips_at_random=[flips(layer, source, [[p] for p in elsewhere]) for layer in layers],
        flips_from_abbreviation=[flips(layer, neutral, -1, -1) for layer in layers],
        state_readable=readable,
        state_readable_at_random=at_random,
        capital_readable=capitals,
    )


def _first(lm: "LanguageModel", word: str) -> int:
    """The first token of a word after a space."""
    alone, followed = ids_of(lm, ["x", f"x {word}"])
    return followed[len(alone)]


def _is_whole(lm: "LanguageModel", word: str) -> bool:
    """Whether a word after a space is one token."""
    alone, followed = ids_of(lm, ["x", f"x {word}"])
    return len(followed) == len(alone) + 1


def _top(run: "Run") -> "Tensor":
    assert run.logits is not None
    return run.logits[:, -1].argmax(-1).cpu()


# Refusal


@dataclass(frozen=True)
class Reaction:
    """How requests are met: refused ("I cannot ...") and answered ("Sure", "Of course"); the rest does neither."""

    refused: Rate
    answered: Rate


@dataclass(frozen=True)
class Intervention:
    """One way to change refusal, its setting chosen on training requests, its figures on held-out ones.

    `requests` says which were asked; `random` is the mean over directions drawn at random and scaled alike; `price` the
    mean KL divergence in nats a token on facts text, `random_price` that of the random directions.
    """

    name: str
    position: str
    layer: int
    requests: str
    result: Reaction
    random: Reaction
    price: float
    random_price: float
    by_layer: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RefusalChecks:
    """Unedited reactions to held-out requests, and each intervention."""

    harmful: Reaction
    harmless: Reaction
    interventions: list[Intervention]


def react(lm: "LanguageModel", chats: Sequence[Chat], edits: "Sequence[Edit]" = ()) -> Reaction:
    """Reply to each conversation with a few tokens and count refusals and answers."""
    out = replies(lm, chats, max_new_tokens=4, edits=edits)
    answers = tuple(ANSWERED.split("|"))
    return Reaction(
        rate([reply.strip().startswith(STUDY_REFUSAL) for reply in out]),
        rate([reply.strip().startswith(answers) for reply in out]),
    )


def difference_of_means(
    lm: "LanguageModel", harmful: Sequence[Chat], harmless: Sequence[Chat], position: str
) -> "tuple[Tensor, Tensor]":
    """Mean resid_post on harmful minus harmless requests, and the harmless mean: [layers, d] each (Arditi et al. 2024).

    `position`: "assistant" (the token that opens the reply) or "request" (the mean over the user's words).
    """
    means = [_mean_stream(lm, chats, position) for chats in (harmful, harmless)]
    return means[0] - means[1], means[1]


def _mean_stream(lm: "LanguageModel", chats: Sequence[Chat], position: str) -> "Tensor":
    total = torch.zeros(lm.n_layers, lm.d_model)
    for start in range(0, len(chats), 64):
        some = chats[start : start + 64]
        run = lm.run(lm.chat_tokens([as_dicts(chat) for chat in some]), capture="blocks.*.resid_post", logits=None)
        stream = run.stack("blocks.*.resid_post").float().cpu()  # [layers, b, p, d]
        for row in range(len(some)):
            columns = slice(int(run.tokens.first[row]), int(run.tokens.last[row]) + 1)
            values = stream[:, row, columns]
            # beginning-of-text, <|user|>, the request, <|end|>, <|assistant|>
            total += values[:, -1] if position == "assistant" else values[:, 2:-2].mean(1)
    return total / len(chats)


def _writes(direction: "Tensor") -> "list[Edit]":
    """Take the direction out of everything that is written to the stream."""
    sites = ("embed", "blocks.*.attn.out", "blocks.*.mlp.out")
    return [edit.project_out(site, direction) for site in sites]


def _clamp_from(layer: int, layers: int, direction: "Tensor", value: float) -> "list[Edit]":
    return [edit.clamp(f"blocks.{i}.resid_post", direction, maximum=value) for i in range(layer, layers)]


def refusal_checks(
    lm: "LanguageModel",
    *,
    train: tuple[Sequence[Chat], Sequence[Chat]],
    held_out: tuple[Sequence[Chat], Sequence[Chat]],
    facts: Sequence[str],
    n_random: int = 3,
    seed: int = 0,
) -> RefusalChecks:
    """Ablate, clamp and add the refusal direction. Pairs are (harmful, harmless) conversations of one user turn.

    The last fifth of `train` chooses layer and position, the rest gives the directions; `held_out` is only measured.
    """
    cut = [len(chats) * 4 // 5 for chats in train]
    fit = [chats[:at] for chats, at in zip(train, cut, strict=True)]
    choose = [chats[at:] for chats, at in zip(train, cut, strict=True)]
    directions = {p: difference_of_means(lm, fit[0], fit[1], p) for p in ("assistant", "request")}

    def zero_ablation(direction: "Tensor", mean: "Tensor", layer: int) -> "list[Edit]":
        return _writes(direction)

    def clamp(direction: "Tensor", mean: "Tensor", layer: int) -> "list[Edit]":
        unit = direction / direction.norm()
        return _clamp_from(layer, lm.n_layers, direction, float(mean @ unit))

    def add(direction: "Tensor", mean: "Tensor", layer: int) -> "list[Edit]":
        return [edit.add(f"blocks.{layer}.resid_post", direction, scale=2.0)]

    ways: list[tuple[str, str, Callable[..., list[Edit]]]] = [
        ("zero-ablate at every write", "harmful", zero_ablation),
        ("clamp to the harmless mean from the layer on", "harmful", clamp),
        ("add twice", "harmless", add),
    ]
    generator = torch.Generator().manual_seed(seed)
    out = []
    for name, requests, make in ways:
        which = 0 if requests == "harmful" else 1
        best, by_layer = None, {}
        for position, (difference, mean) in directions.items():
            scores = []
            for layer in range(lm.n_layers):
                found = react(lm, choose[which], make(difference[layer], mean[layer], layer))
                scores.append((found.answered if which == 0 else found.refused).value)
                if best is None or scores[-1] > best[0]:
                    best = scores[-1], position, layer
            by_layer[position] = scores
        assert best is not None
        _, position, layer = best
        difference, mean = (tensor[layer] for tensor in directions[position])
        edits = make(difference, mean, layer)
        randoms = []
        for _ in range(n_random):
            drawn = torch.randn(difference.shape, generator=generator)
            randoms.append(make(drawn * difference.norm() / drawn.norm(), mean, layer))
        reactions = [react(lm, held_out[which], some) for some in randoms]
        out.append(
            Intervention(
                name=name,
                position=position,
                layer=layer,
                requests=requests,
                result=react(lm, held_out[which], edits),
                random=Reaction(_pool([r.refused for r in reactions]), _pool([r.answered for r in reactions])),
                price=price(lm, facts, edits),
                random_price=float(np.mean([price(lm, facts, some) for some in randoms])),
                by_layer=by_layer,
            )
        )
    return RefusalChecks(react(lm, held_out[0]), react(lm, held_out[1]), out)


def _pool(rates: Sequence[Rate]) -> Rate:
    return Rate(sum(r.successes for r in rates), sum(r.n for r in rates))


def price(lm: "LanguageModel", texts: Sequence[str], edits: "Sequence[Edit]") -> float:
    """Mean KL(unedited ‖ edited) in nats over the tokens of `texts`."""
    tokens = lm.tokens(list(texts))
    before, after = (lm.run(tokens, edits=some).logits for some in ((), edits))
    assert before is not None
    assert after is not None
    mask = tokens.mask.to(before.device)
    p, q = before[mask].float().log_softmax(-1), after[mask].float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
