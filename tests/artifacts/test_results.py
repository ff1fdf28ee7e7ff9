"""Effects carry their evidence, and survive JSON exactly."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutaway.artifacts.errors import CutawayError, MissingControls
from cutaway.artifacts.results import Control, Effect

numbers = st.floats(allow_nan=False)  # NaN is unequal to itself; see the test below
intervals = st.none() | st.tuples(numbers, numbers)
controls = st.builds(Control, st.text(), numbers, intervals, st.none() | st.integers(0))
effects = st.builds(
    Effect,
    name=st.text(),
    value=numbers,
    n=st.integers(0),
    interval=intervals,
    controls=st.lists(controls, max_size=3).map(tuple),
    ablation=st.text(),
    units=st.text(),
    command=st.none() | st.text(),
)


@given(effects)
def test_an_effect_survives_json_exactly(effect: Effect) -> None:
    assert Effect.from_json(json.loads(json.dumps(effect.to_json(), allow_nan=False))) == effect


def test_a_number_that_does_not_exist_survives_json_too() -> None:
    effect = Effect("lens", math.nan, 1, (math.nan, math.inf), (), "none", "nats")
    back = Effect.from_json(json.loads(json.dumps(effect.to_json(), allow_nan=False)))
    assert math.isnan(back.value)
    assert back.interval is not None
    assert math.isnan(back.interval[0])
    assert back.interval[1] == math.inf


def test_an_effect_without_controls_is_refused() -> None:
    alone = Effect("induction heads", 1.0, 20, (0.5, 1.5), (), "mean ablation", "nats")
    with pytest.raises(MissingControls, match="induction heads"):
        alone.require_controls()
    assert issubclass(MissingControls, CutawayError)
    beside = Effect("induction heads", 1.0, 20, None, (Control("random heads", 0.0),), "mean ablation", "nats")
    assert beside.require_controls() is beside


def test_an_effect_writes_itself_with_its_evidence() -> None:
    random = Control("random direction", 0.02, (-0.01, 0.05), 20)
    effect = Effect("lead", 0.83, 48, (0.79, 0.87), (random, Control("unsteered", 0.0)), "none", "logits")
    assert effect.figure(2) == "0.83 [0.79, 0.87]"
    assert effect.text(2) == "0.83 [0.79, 0.87] logits, n 48; random direction 0.02 [-0.01, 0.05]; unsteered 0.00"
    assert str(effect).startswith("lead: 0.830 [0.790, 0.870] logits, n 48; ")
    assert Effect("lead", 0.5, 1, None, (), "none", "").text() == "0.500, n 1"
