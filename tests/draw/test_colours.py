"""The style sheet's colours: legible in light and dark, and ordered for colour-blind readers."""

import re

import numpy as np
import pytest

from cutaway.draw.scale import STEPS, Scale, scale_for
from cutaway.draw.style import stylesheet

CSS = stylesheet()
THEMES = ("light", "dark")


def _pairs(pattern: str) -> dict[str, tuple[str, str]]:
    found = re.findall(pattern + r":\s*light-dark\((#\w{6}), (#\w{6})\)", CSS)
    return {name: (light, dark) for name, light, dark in found}


ROLES = _pairs(r"--([a-z-]+)")
STEP = {
    (letter, int(step), kind, theme): colour
    for letter, step, fill, on in re.findall(
        r"\.cw-([sd])(\d+) \{ --fill: light-dark\((.*?)\); --on: light-dark\((.*?)\); \}", CSS
    )
    for kind, both in (("fill", fill), ("on", on))
    for theme, colour in zip(THEMES, both.split(", "), strict=True)
}


def _linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    return float(_linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_the_reader_finds_every_step():
    assert len(STEP) == 2 * STEPS * 2 * 2
    assert {"paper", "ink", "soft", "accent", "control"} <= set(ROLES)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("letter", ["s", "d"])
def test_numbers_are_legible_on_every_step(letter, theme):
    for step in range(STEPS):
        assert contrast(STEP[letter, step, "fill", theme], STEP[letter, step, "on", theme]) >= 4.5


@pytest.mark.parametrize("theme", [0, 1])
def test_text_is_legible_on_every_ground(theme):
    for text in ("ink", "soft", "accent", "control"):
        for ground in ("paper", "surface", "sunk"):
            assert contrast(ROLES[text][theme], ROLES[ground][theme]) >= 4.5, (text, ground)


@pytest.mark.parametrize("theme", [0, 1])
def test_curves_stand_out_from_the_paper(theme):
    curves = re.findall(r"\.cw-c\d \{ --line: light-dark\((#\w{6}), (#\w{6})\)", CSS)
    assert len(curves) == 6
    for curve in curves:
        assert contrast(curve[theme], ROLES["paper"][theme]) >= 3


@pytest.mark.parametrize("theme", THEMES)
def test_lightness_alone_orders_the_scales(theme):
    sequential = [luminance(STEP["s", step, "fill", theme]) for step in range(STEPS)]
    diverging = [luminance(STEP["d", step, "fill", theme]) for step in range(STEPS)]
    away = -1 if theme == "light" else 1  # darker away from white paper, lighter away from black
    assert all(np.diff(sequential) * away > 0)
    assert all(np.diff(diverging[5:]) * away > 0)
    assert all(np.diff(diverging[:6]) * away < 0)


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def _oklab(linear: np.ndarray) -> np.ndarray:
    lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    ) @ np.clip(linear, 0, 1)
    return np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    ) @ np.cbrt(lms)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", list(BLINDNESS))
def test_the_two_arms_of_the_diverging_scale_differ_for_every_eye(kind, theme):
    matrix = np.array(BLINDNESS[kind])
    for step in range(1, 6):
        seen = [_oklab(matrix @ _linear(STEP["d", place, "fill", theme])) for place in (5 - step, 5 + step)]
        # in lightness-chroma space 0.02 is about a just noticeable difference
        assert np.linalg.norm(seen[0] - seen[1]) > 0.02 * min(step, 4)


def test_scales_place_values():
    scale = Scale(0.0, 1.0)
    assert [scale.css(v) for v in (0.0, 0.5, 1.0, 7.0, -7.0)] == ["cw-s0", "cw-s5", "cw-s10", "cw-s10", "cw-s0"]
    assert scale.css(None) == scale.css(float("nan")) == "cw-na"
    assert Scale(-2.0, 2.0, True).css(0.0) == "cw-d5"
    assert [scale.css(x) for x in (1.7e307, -1.7e307)] == ["cw-s10", "cw-s0"]  # ten times this is infinite


@pytest.mark.parametrize(
    ("values", "diverging", "ends"),
    [
        ([0.2, 0.9], False, (0.0, 0.9)),
        ([12.0, 13.0], False, (12.0, 13.0)),
        ([-1.0, 3.0], False, (-1.0, 3.0)),
        ([-1.0, 3.0], True, (-3.0, 3.0)),
        ([2.0, 2.0], False, (2.0, 3.0)),
        ([0.0, 0.0], True, (-1.0, 1.0)),
        ([None, float("nan")], False, (0.0, 1.0)),
        ([], True, (-1.0, 1.0)),
    ],
)
def test_a_scale_holds_its_values(values, diverging, ends):
    scale = scale_for(values, diverging)
    assert (scale.low, scale.high) == ends
    assert scale.diverging is diverging


def test_a_legend_names_both_ends_and_the_units():
    legend = Scale(-0.5, 0.5, True).legend("logit <difference>")
    assert all(text in legend for text in ("−0.5", ">0<", "0.5", "logit &lt;difference&gt;"))
