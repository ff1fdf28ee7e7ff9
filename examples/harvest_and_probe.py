"""Can the stream at a city's token tell which region its state lies in? A linear probe, with its controls.

    python examples/harvest_and_probe.py
"""

import random

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import cutaway
from cutaway.subjects.world.facts import CITIES

lm = cutaway.load("atlas")

# Cities of the world that atlas was trained on, with the region of their state as the label.
cities = [(city.name, city.state.region) for city in CITIES]
prompts = [f"{name} is a city in" for name, _ in cities]
regions = np.array([region for _, region in cities])
places = [lm.tokens(prompt).find(0, name.split()[-1]) for prompt, (name, _) in zip(prompts, cities, strict=True)]

# Harvest: the stream after every layer at the last token of the city's name.
run = lm.run(prompts, capture="blocks.*.resid_post", logits=None)
stream = run.stack("blocks.*.resid_post")[:, range(len(prompts)), places].numpy()  # [layer, city, d_model]

shuffled = list(regions)
random.Random(0).shuffle(shuffled)  # control: labels that mean nothing
commonest = np.unique(regions, return_counts=True)[1].max() / len(regions)
print(f"{len(cities)} cities, {len(set(regions))} regions; always the commonest: {commonest:.2f}")
print("layer   accuracy   shuffled labels   (5-fold cross-validation, cities held out)")
for layer, x in enumerate(stream):
    x = (x - x.mean(0)) / x.std(0)
    probe = LogisticRegression(C=0.01, max_iter=300)
    real, control = (cross_val_score(probe, x, labels, cv=5).mean() for labels in (regions, np.array(shuffled)))
    print(f"{layer:5}   {real:8.2f}   {control:15.2f}")
