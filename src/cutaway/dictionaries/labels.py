"""Labels of tokens that any text has, to probe a dictionary for: first letters, and things of atlas's world."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cutaway.dictionaries.ports import PortValues
from cutaway.model.language_model import LanguageModel


def first_letters(lm: LanguageModel, ids: Tensor) -> np.ndarray:
    """The first letter of each token [n], "a" to "z" whatever its case; "" where a token does not begin with one."""
    unique, place = torch.unique(ids.cpu(), return_inverse=True)
    letters = []
    for text in lm.token_strings(unique.tolist()):
        first = text.lstrip(" ▁Ġ")[:1].lower()
        letters.append(first if first.isascii() and first.isalpha() else "")
    return np.array(letters)[place.numpy()]


def named(lm: LanguageModel, ids: Tensor, names: Mapping[str, Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """What each token [n] names, and by which name: labels and names, "" where it is none of them.

    `names` are the names that a label goes by, {"Texas": ("Dallas", "Houston")}. Only names of one token (with a space
    before it) are found.
    """
    unique, place = torch.unique(ids.cpu(), return_inverse=True)
    label_of: dict[int, tuple[str, str]] = dict.fromkeys(unique.tolist(), ("", ""))
    for label, some in names.items():
        for name in some:
            tokens = lm.tokens(f" {name}", bos=False).ids[0].tolist()
            if len(tokens) == 1 and tokens[0] in label_of:
                label_of[tokens[0]] = (label, name)
    found = np.array([label_of[number] for number in unique.tolist()], dtype=object).reshape(-1, 2)
    return found[place.numpy(), 0].astype(str), found[place.numpy(), 1].astype(str)


def states_of_cities(lm: LanguageModel, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The state of each token [n] that is a city of atlas's world, and the city; "" elsewhere."""
    from cutaway.subjects.world.facts import CITIES

    names: dict[str, list[str]] = {}
    for city in CITIES:
        names.setdefault(city.state.name, []).append(city.name)
    return named(lm, ids, names)


def counted_ids(rows: Tensor, values: PortValues) -> Tensor:
    """The token of each position of harvested values, int64 [n]."""
    return rows[values.keep]


def frequent(labels: np.ndarray, groups: np.ndarray, *, least: int, least_groups: int) -> list[str]:
    """Labels ("" left out) that at least `least` tokens in `least_groups` groups have, sorted."""
    found = []
    for label in np.unique(labels):
        has = labels == label
        if label and has.sum() >= least and len(np.unique(groups[has])) >= least_groups:
            found.append(str(label))
    return found
