"""Does the stream tell in which region a city lies, and where? A harvest, then probes with their controls.

python examples/harvest_and_probe.py
"""

import cutaway
from cutaway.data import Rules, harvest
from cutaway.observe import probe_data, probe_sweep
from cutaway.subjects import CITIES, documents

lm = cutaway.load("atlas")

# Harvest: the stream after layer 3 at every token of a corpus; with out="folder" it may be larger than memory.
store = harvest(lm, list(documents("facts", 1, 4_000)), "blocks.3.resid_post", rules=Rules(high_norm=8.0))
print(store)
batch = next(store.batches(4, seed=0))  # from all over the corpus: one shuffle of the whole store
for token, vector in zip(lm.token_strings(batch.token), batch["blocks.3.resid_post"], strict=True):
    print(f"  {token!r:>14}  length of its vector {vector.norm():.1f}")

# Probe: cities of the world that atlas was trained on. No state is on both sides of a fold.
cities = [(city.name, city.state) for city in CITIES]
data = probe_data(
    lm,
    [f"{name} is a city in" for name, _ in cities],
    [state.region for _, state in cities],
    groups=[state.name for _, state in cities],
    position=[name.split()[-1] for name, _ in cities],  # read at the city's last token
)
sweep = probe_sweep(lm, data, sites="blocks.{0..3}.resid_post", n_folds=3, draws=2)
print(f"\n{sweep}")
best = sweep.best.effect
print(f"\n{best.name}: {best.value:.2f}, beside")
for control in best.controls:
    print(f"  {control.name:<20} {control.value:.2f}")
