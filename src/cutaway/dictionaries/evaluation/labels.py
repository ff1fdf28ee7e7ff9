"""Labels to probe a dictionary for: first letters, which any text has, and the states of cities of atlas's world."""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from cutaway.dictionaries.ports import PortValues
from cutaway.model.language_model import LanguageModel


def first_letters(lm: LanguageModel, ids: Tensor) -> np.ndarray:
    """The first letter of each token.

    Args:
        lm: The model, for its tokenizer.
        ids: Token ids [n].

    Returns:
        "a" to "z" whatever the case, "" where a token does not begin with a letter, [n].
    """
    unique, place = torch.unique(ids.cpu(), return_inverse=True)
    letters = []
    for text in lm.token_strings(unique.tolist()):
        first = text.lstrip(" ▁Ġ")[:1].lower()
        letters.append(first if first.isascii() and first.isalpha() else "")
    return np.array(letters)[place.numpy()]


_CITY_FRAMES = ("The capital of the state containing{}", "The state containing{}", "She lives in{}", "The city of{}")


def states_of_cities(lm: LanguageModel, n_states: int = 8) -> tuple[list[str], list[str], list[str]]:
    """Texts that end with a city of atlas's world, to probe for its state.

    Only cities of one token (with a space before it) are used, so that all are read alike.

    Args:
        lm: The model, for its tokenizer.
        n_states: How many states, those with the largest numbers of such cities.

    Returns:
        Texts, the state of each, and its city.
    """
    from cutaway.subjects.world.facts import CITIES

    whole = []
    for city in CITIES:
        ids = lm.tokens(f" {city.name}", bos=False).ids[0].tolist()
        if len(ids) == 1 and lm.token_strings(ids)[0].strip(" ▁Ġ") == city.name:  # not a word that is unknown
            whole.append(city)
    counts = Counter(city.state.name for city in whole)
    chosen = set(sorted(counts, key=lambda state: (-counts[state], state))[:n_states])
    texts = [
        (frame.format(f" {city.name}"), city) for city in whole if city.state.name in chosen for frame in _CITY_FRAMES
    ]
    return [text for text, _ in texts], [city.state.name for _, city in texts], [city.name for _, city in texts]


def counted_ids(rows: Tensor, values: PortValues) -> Tensor:
    """The token of each position of harvested values.

    Args:
        rows: Token ids [n, p].
        values: What `harvest_ports` made of them.

    Returns:
        Token ids, int64 [positions].
    """
    return rows[values.keep]


def frequent(labels: np.ndarray, groups: np.ndarray, *, min_tokens: int, min_groups: int) -> list[str]:
    """Labels ("" left out) that at least `min_tokens` tokens in `min_groups` groups have, sorted."""
    found = []
    for label in np.unique(labels):
        has = labels == label
        if label and has.sum() >= min_tokens and len(np.unique(groups[has])) >= min_groups:
            found.append(str(label))
    return found
