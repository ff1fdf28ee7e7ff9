"""The tour's data: exact through JSON, and refused when it does not fit together."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sample_page import effect, sample

from cutaway.artifacts.results import Control, Effect
from cutaway.draw.blocks import (
    Card,
    EffectBlock,
    Figure,
    Figures,
    Heatmap,
    Lens,
    Section,
    Series,
    Table,
    Text,
    TokenRow,
    TourResult,
)
from cutaway.tour.observing import median_place

SECTION = {"id": "a", "title": "t", "question": "q", "lead": "l"}


def through_json(value):
    return type(value).model_validate_json(value.model_dump_json())


def test_a_whole_tour_survives_json_exactly():
    result = sample()
    again = through_json(result)
    assert again == result
    assert again.model_dump_json() == result.model_dump_json()
    assert {block.kind for section in again.sections for block in section.blocks} == {
        "text", "figures", "table", "heatmap", "line", "bars", "tokens", "lens", "compare", "effect", "features",
    }  # fmt: skip


def test_the_json_is_standard():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(sample().model_dump_json(), parse_constant=refuse)


@given(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(st.characters()))
def test_any_cell_keeps_value_and_type(value):
    table = Table(columns=("a",), rows=((value,),))
    (cell,) = table.rows[0]
    assert through_json(table) == table
    if isinstance(value, float) and not math.isfinite(value):
        assert cell is None
    elif isinstance(value, str):
        assert cell == value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    else:
        assert cell == value
        assert type(cell) is type(value)


def test_numbers_of_other_libraries_become_plain():
    values = [np.float32(0.5), np.float64(0.1), np.int64(3), np.float32("nan"), np.bool_(True)]
    plain = [Figure(label="a", value=value).value for value in values]
    assert plain == [0.5, 0.1, 3, None, True]
    assert [type(value) for value in plain] == [float, float, int, type(None), bool]
    assert Heatmap(rows=("a",), columns=("b",), values=np.array([[1.5]])).values == ((1.5,),)  # pyright: ignore


def test_an_effect_is_kept_as_its_json():
    measured = Effect("e", 0.5, 10, (0.4, 0.6), (Control("random", 0.1),), "zero", "nats", "cutaway tour")
    block = EffectBlock(effect=measured)  # pyright: ignore
    assert Effect.from_json(through_json(block).effect) == measured


def test_paths_and_tuples_in_the_configuration_become_json():
    result = sample().model_copy()
    data = {**result.model_dump(), "configuration": {"corpus": Path("a") / "b", "layers": (1, 2), "x": math.nan}}
    again = TourResult.model_validate(data)
    assert again.configuration == {"corpus": "a/b", "layers": [1, 2], "x": None}
    assert through_json(again) == again


def test_data_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        sample().title = "other"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Heatmap(rows=("a",), columns=("b",), values=((1, 2),)), "columns of a heatmap's values: 2 where 1"),
        (lambda: Heatmap(rows=("a",), columns=("b",), values=((1,),), marks=((1, 0),)), "outside the heatmap"),
        (lambda: Heatmap(rows=("a",), columns=("b",), values=((1,),), cell_text=((),)), "cell_text: 0 where 1"),
        (lambda: Lens(layers=("a",), tokens=("b",), top=(("x",),), probability=((),)), "lens's probability"),
        (lambda: Table(columns=("a",), rows=((1, 2),)), "cells in a table row"),
        (lambda: TokenRow(tokens=("a",), values=()), "values of a token row"),
        (lambda: Series(name="s", x=(1,), y=()), "points of y in series 's'"),
        (lambda: Series(name="s", x=(1,), y=(1,), low=(1,)), "one of low and high"),
        (lambda: Figures(items=()), "at least 1 item"),
        (lambda: Section(**SECTION), "nothing to show"),  # pyright: ignore
        (lambda: Section(**SECTION, status="not shown"), "must say why"),  # pyright: ignore
        (lambda: Section(**SECTION, status="fallback", blocks=(Text(text="x"),)), "must say why"),  # pyright: ignore
        (lambda: Section(**{**SECTION, "id": "A b"}, effects=(effect(),)), "pattern"),  # pyright: ignore
        (lambda: Card(name="a", identity="b", parameters=1, wrong=1), "Extra inputs"),  # pyright: ignore
        (lambda: TourResult(**{**sample().model_dump(), "sections": sample().sections * 2}), "not unique"),
    ],
)
def test_what_does_not_fit_is_refused(make, complaint):
    with pytest.raises(ValidationError, match=complaint):
        make()


def test_a_sample_is_the_median_one():
    assert median_place(torch.tensor([0.9, 0.1, 0.5])) == 2
    assert median_place(torch.tensor([0.4, 0.3, 0.2, 0.1])) == 2
