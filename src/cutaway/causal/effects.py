"""Results that are effects beside their controls: how they are printed, tabulated and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.draw.charts import Bar
from cutaway.draw.intervals import intervals_svg
from cutaway.draw.result import Result


@dataclass(frozen=True, repr=False)
class Effects(Result):
    """A few figures of one circuit, each beside its controls."""

    effects: tuple[Effect, ...]
    """The figures: value, n, 95 % interval, controls, the six choices."""

    title = "Effects"

    def effect(self, name: str) -> Effect:
        """The effect whose name begins so."""
        return _named_effect(self.effects, name)

    def summary(self) -> str:
        return "\n".join([f"{self.title}: n {self.effects[0].n}" if self.effects else self.title, *self._lines()])

    def _lines(self) -> list[str]:
        return [effect_line(effect) for effect in self.effects[:10]]

    def to_json(self) -> dict[str, Any]:
        return {"effects": [effect.to_json() for effect in self.effects]}

    def rows(self) -> list[dict[str, Any]]:
        """A row per effect and per control."""
        return [
            {
                "effect": effect.name, "name": one.name, "control": one is not effect, "value": one.value,
                "low": (one.interval or (None, None))[0], "high": (one.interval or (None, None))[1],
                "n": one.n, "units": effect.units, "ablation": effect.ablation,
            }
            for effect in self.effects
            for one in (effect, *effect.controls)
        ]  # fmt: skip

    def drawing(self) -> Markup:
        return effects_drawing(self.effects, self.title)


def _named_effect(effects: Sequence[Effect], name: str) -> Effect:
    """The effect whose name begins so; CutawayError with the names there are."""
    for effect in effects:
        if effect.name.startswith(name):
            return effect
    raise CutawayError(
        f"nothing called {name!r} was measured of this circuit; there are {', '.join(e.name for e in effects)}"
    )


def effect_line(effect: Effect) -> str:
    """An effect and its controls in one line."""
    ends = "" if effect.interval is None else f" {interval_text(effect.interval, 2)}"
    controls = "; ".join(control.text(2) for control in effect.controls)
    return f"  {effect.name}: {effect.value:.3f}{ends}   beside {controls}"


def effects_drawing(effects: Iterable[Effect], title: str) -> Markup:
    """All effects in one picture, each with its controls in its row; those in the same units are on one scale."""
    groups: dict[str, list[Bar]] = {}
    for effect in effects:
        controls = [_bar(control) for control in effect.require_controls().controls]
        groups.setdefault(effect.units, []).append({**_bar(effect), "controls": controls})
    return intervals_svg(groups=list(groups.values()), title=title)


def _bar(one: Effect | Control) -> Bar:
    low, high = one.interval or (None, None)
    name = one.name if one.n is None else f"{one.name}, n {one.n:,}"
    name += f" ({one.units})" if isinstance(one, Effect) else ""
    return {"label": name, "value": one.value, "low": low, "high": high}
