"""The style sheet of all drawings."""

from importlib.resources import files

from markupsafe import Markup


def asset(name: str) -> str:
    """The text of a style sheet or script of this package."""
    return files("cutaway.draw").joinpath(name).read_text(encoding="utf-8").strip()


def stylesheet() -> str:
    """The CSS that every drawing needs, light and dark."""
    return asset("cutaway.css")


def script() -> str:
    """The script of all drawings: values by keyboard and touch, tables that sort. Nothing is missing without it."""
    return asset("page.js")


def standalone(drawing: Markup) -> Markup:
    """A drawing with its style sheet, for a notebook's `display(HTML(...))`.

    Args:
        drawing: What a function of `cutaway.draw` returned.
    """
    return Markup(f"<style>{stylesheet()}</style><div>{drawing}</div>")
