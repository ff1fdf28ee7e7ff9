"""Does the stream tell in which region a city lies, and where? A linear probe in every layer, with its controls.

python examples/harvest_and_probe.py
"""

import random
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cutaway
from cutaway.subjects.world.facts import CITIES

lm = cutaway.load("atlas")

# Cities of the world that atlas was trained on, with the region of their state as the label.
cities = [(city.name, city.state.region) for city in CITIES]
prompts = [f"{name} is a city in" for name, _ in cities]
regions = [region for _, region in cities]
places = [lm.tokens(prompt).find(0, name.split()[-1]) for prompt, (name, _) in zip(prompts, cities, strict=True)]

# Harvest: the stream after every layer, at the last token of the city's name and at the prompt's last token.
run = lm.run(prompts, capture="blocks.*.resid_post", logits=None)
stream = run.stack("blocks.*.resid_post")  # [layer, city, position, d_model]
rows = range(len(prompts))
at_city, at_last = stream[:, rows, places].numpy(), stream[:, rows, run.tokens.last].numpy()

shuffled = list(regions)
random.Random(0).shuffle(shuffled)  # control: labels that mean nothing
commonest = np.unique(regions, return_counts=True)[1].max() / len(regions)


def accuracy(x: np.ndarray, labels: Sequence[str]) -> float:
    """Five-fold cross-validated: every city is judged by a probe that has not seen it."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return cross_val_score(probe, x, np.array(labels), cv=5).mean()


print(f"{len(cities)} cities, {len(set(regions))} regions; always the commonest: {commonest:.2f}")
print("layer   at the city   at 'in'   at 'in', shuffled labels")
for layer in range(lm.n_layers):
    found = accuracy(at_city[layer], regions), accuracy(at_last[layer], regions), accuracy(at_last[layer], shuffled)
    print(f"{layer:5}   {found[0]:11.2f}   {found[1]:7.2f}   {found[2]:24.2f}")
