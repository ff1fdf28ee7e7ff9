"""The bridge of atlas's two-hop facts, city → state → capital: located by patching, confirmed by swaps.

    python tools/atlas_bridge.py [N_PAIRS]

The causal model has one variable between city and answer, the state. On cities that atlas met in two-hop sentences the
state is looked for at every layer, at the city and at the last token, from sources that ask for another thing of the
state (its abbreviation), so that what is carried over cannot be the answer. The place found is then measured on cities
that no two-hop sentence of the corpus mentions, beside controls, and with sources that name the state without a city.
Prints the tables of docs/causal.md.
"""

import json
import sys
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

import cutaway
from cutaway.atlas_evaluation.causal_checks import NEUTRAL_SOURCE, TWO_HOP
from cutaway.causal.abstraction.causal_model import CausalModel, Example, Swap, Variable
from cutaway.causal.abstraction.interchange import interchange, interchange_grid
from cutaway.causal.abstraction.outcomes import Interchanged, Place
from cutaway.model.language_model import LanguageModel
from cutaway.subjects.world.facts import CITIES, STATES, City
from cutaway.subjects.world.held_out import two_hop_entity

ASKS = {"capital": TWO_HOP, "abbreviation": NEUTRAL_SOURCE}
DIRECT = "The abbreviation of the state of {state} is"
_STATE = {state.name: state for state in STATES}
_OF = {city.name: city.state.name for city in CITIES}

BRIDGE = CausalModel(
    inputs=("entity", "question"),
    variables={
        "state": Variable(("entity",), lambda entity: _OF.get(entity, entity)),
        "answer": Variable(("state", "question"), lambda state, question: f" {getattr(_STATE[state], question)}"),
    },
    answer="answer",
)


def asked(city: City, question: str) -> Example:
    """What is asked about the state of a city."""
    prompt = ASKS[question].format(city=city.name)
    return Example(prompt, {"entity": city.name, "question": question}, {"city": city.name})


def named(city: City) -> Example:
    """The same state named by itself; no city stands in the prompt."""
    prompt = DIRECT.format(state=city.state.name)
    return Example(prompt, {"entity": city.state.name, "question": "abbreviation"}, {"city": city.state.name})


def swaps(lm: LanguageModel, held_out: bool, n: int, source: Callable[[City], Example], seed: int = 0) -> list[Swap]:
    """n pairs of different cities of one pool, one in ten of the same state: there the answer should stay."""
    rng = Random(seed)
    pool = [
        city
        for city in CITIES
        if two_hop_entity(city.name) == held_out
        and city.name not in (city.state.name, city.state.capital)
        and lm.tokens(f" {city.name}", bos=False).ids.shape[1] == 1
    ]
    found: list[Swap] = []
    while len(found) < n:
        base, other = rng.sample(pool, 2)
        if (base.state == other.state) == (len(found) % 10 == 9):
            found.append((asked(base, "capital"), source(other)))
    return found


def state_directions(lm: LanguageModel, place: Place, k: int) -> Tensor:
    """k principal directions of the states' mean values at a place [k, d], from cities met in two-hop sentences."""
    cities = [city for city in CITIES if not two_hop_entity(city.name) and city.name != city.state.capital]
    run = lm.run([asked(city, "capital").prompt for city in cities], capture=place.site, logits=None)
    values = run.last(place.site).float().cpu()
    states = sorted({city.state.name for city in cities})
    means = torch.stack([values[[city.state.name == state for city in cities]].mean(0) for state in states])
    return torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[:k]


def main(n: int = 120, as_json: bool = False) -> None:
    """Locate, confirm, print."""
    lm = cutaway.load("atlas")

    def ask(question: str) -> Callable[[City], Example]:
        return lambda city: asked(city, question)

    seen = swaps(lm, False, n, ask("abbreviation"))
    grids = {
        "abbreviation": interchange_grid(lm, BRIDGE, "state", seen, roles=("city", "last")),
        "capital": interchange_grid(lm, BRIDGE, "state", swaps(lm, False, n, ask("capital")), roles=("city", "last")),
    }
    for question, grid in grids.items():
        print(f"cities met in two-hop sentences, sources that ask for the {question}\n{grid}\n")
    place = grids["abbreviation"].place(roles=("last",))
    results: dict[str, Interchanged] = {}
    for title, source in (
        ("sources that ask for the abbreviation of the state containing another city", ask("abbreviation")),
        ("sources that ask for the abbreviation of the state, named without a city", named),
        ("sources that ask for the capital too", ask("capital")),
    ):
        pairs = swaps(lm, True, n, source, seed=1)
        evaluation = f"pairs of held-out cities that atlas answers rightly, {title}"
        results[title] = interchange(lm, BRIDGE, {"state": [place]}, pairs, evaluation=evaluation)
    for k in (8, 16, 32):
        part = Place(place.site, place.role, basis=state_directions(lm, place, k))
        pairs = swaps(lm, True, n, ask("abbreviation"), seed=1)
        title = f"only {k} directions of the states' means, sources that ask for the abbreviation"
        results[title] = interchange(lm, BRIDGE, {"state": [part]}, pairs, evaluation=f"held-out cities, {title}")
    for title, result in results.items():
        print(f"held-out cities, {title}\n{result}\n")
    if as_json:
        print(json.dumps({title: result.to_json() for title, result in results.items()}, indent=1))


if __name__ == "__main__":
    words = sys.argv[1:]
    main(*(int(word) for word in words if word.isdigit()), as_json="--json" in words)
