"""What a tour hands to its page: sections of plain data, with an exact JSON round trip.

A step of the tour returns one `Section`; the page draws it. Nothing here knows about models or tensors: lists of
numbers and strings only. JSON has no NaN, so a number that is not finite becomes `None`, which is drawn as "–".

    section = Section(id="lens", title="Logit lens", question="Where does the answer appear?", lead="...", ...)
    Section.model_validate_json(section.model_dump_json()) == section

Lists may be passed wherever a tuple is declared.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cutaway.artifacts.files import plain


def _plain_number(value: Any) -> Any:
    """A Python number of a scalar array or tensor, `None` for NaN and infinities; the rest is left to pydantic."""
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_plain_number)]
Value = Annotated[bool | int | float | str | None, BeforeValidator(_plain_number)]
Json = Annotated[dict[str, Any], BeforeValidator(plain)]
EffectJson = Json
"""`cutaway.artifacts.results.Effect` as JSON (an `Effect` itself is turned into it)."""


def _encodable(value: Any) -> Any:
    """Strings without lone surrogates (a file name's undecodable byte, say), which no UTF-8 file can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _utf8(cls, data: Any) -> Any:
        return _encodable(data)


def _same(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{what}: {got} where {expected} are needed")


class Text(_Data):
    """A paragraph; a blank line starts another."""

    kind: Literal["text"] = "text"
    text: str


class Figure(_Data):
    """One number with its name.

    Attributes:
        label: Its name.
        value: The number, or a short text ("L3H7").
        units: Of the value.
        detail: Small, below.
        control: Drawn as a control.
    """

    label: str
    value: Value
    units: str = ""
    detail: str = ""
    control: bool = False


class Figures(_Data):
    """Stat tiles. The first figure of a section's first `figures` block is also its line in "In short".

    Attributes:
        kind: "figures".
        items: The tiles.
    """

    kind: Literal["figures"] = "figures"
    items: tuple[Figure, ...] = Field(min_length=1)


class Table(_Data):
    """`align` has one of "left", "right" per column; by default columns of numbers are right-aligned.

    With `fold`, the table is shown only when the reader opens the line that says it.
    """

    kind: Literal["table"] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    caption: str = ""
    fold: str = ""
    align: tuple[Literal["left", "right"], ...] | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for row in self.rows:
            _same("cells in a table row", len(row), len(self.columns))
        if self.align is not None:
            _same("alignments of a table", len(self.align), len(self.columns))
        return self


class Heatmap(_Data):
    """`values[row][column]`; `marks` are (row, column) cells to outline; `cell_text` replaces the printed numbers."""

    kind: Literal["heatmap"] = "heatmap"
    rows: tuple[str, ...] = Field(min_length=1)
    columns: tuple[str, ...] = Field(min_length=1)
    values: tuple[tuple[Number, ...], ...]
    caption: str = ""
    units: str = ""
    diverging: bool = False
    cell_text: tuple[tuple[str, ...], ...] | None = None
    row_axis: str = ""
    column_axis: str = ""
    marks: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for name, grid in (("values", self.values), ("cell_text", self.cell_text)):
            if grid is None:
                continue
            _same(f"rows of a heatmap's {name}", len(grid), len(self.rows))
            for row in grid:
                _same(f"columns of a heatmap's {name}", len(row), len(self.columns))
        for row, column in self.marks:
            if not (0 <= row < len(self.rows) and 0 <= column < len(self.columns)):
                raise ValueError(f"mark ({row}, {column}) is outside the heatmap")
        return self


class Series(_Data):
    """One curve; `low` and `high` bound its interval point by point; `control` curves are drawn grey and dashed."""

    name: str
    x: tuple[float, ...] = Field(min_length=1)
    y: tuple[Number, ...]
    low: tuple[Number, ...] | None = None
    high: tuple[Number, ...] | None = None
    control: bool = False

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        for name, values in (("y", self.y), ("low", self.low), ("high", self.high)):
            if values is not None:
                _same(f"points of {name} in series {self.name!r}", len(values), len(self.x))
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r} has one of low and high; give both or neither")
        return self


class Line(_Data):
    kind: Literal["line"] = "line"
    series: tuple[Series, ...] = Field(min_length=1)
    x_label: str = ""
    y_label: str = ""
    caption: str = ""


class Bar(_Data):
    label: str
    value: Number
    low: Number = None
    high: Number = None
    control: bool = False


class Bars(_Data):
    """Horizontal bars from zero; `control` bars are hatched."""

    kind: Literal["bars"] = "bars"
    items: tuple[Bar, ...] = Field(min_length=1)
    units: str = ""
    caption: str = ""


class TokenRow(_Data):
    """A text as tokens, each tinted by its value (`None`: no tint)."""

    label: str = ""
    tokens: tuple[str, ...]
    values: tuple[Number, ...]
    detail: str = ""

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        _same("values of a token row", len(self.values), len(self.tokens))
        return self


class Tokens(_Data):
    kind: Literal["tokens"] = "tokens"
    rows: tuple[TokenRow, ...] = Field(min_length=1)
    caption: str = ""
    units: str = ""


class Lens(_Data):
    """Logit-lens grid: `top[layer][position]` is the most probable token there, `probability` its probability."""

    kind: Literal["lens"] = "lens"
    layers: tuple[str, ...] = Field(min_length=1)
    tokens: tuple[str, ...] = Field(min_length=1)
    top: tuple[tuple[str, ...], ...]
    probability: tuple[tuple[Number, ...], ...]
    caption: str = ""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for name, grid in (("top", self.top), ("probability", self.probability)):
            _same(f"rows of a lens's {name}", len(grid), len(self.layers))
            for row in grid:
                _same(f"columns of a lens's {name}", len(row), len(self.tokens))
        return self


class Continuation(_Data):
    """One text of a comparison; every occurrence of a `highlight` string is marked in it."""

    label: str
    text: str
    note: str = ""
    control: bool = False
    highlight: tuple[str, ...] = ()


class Compare(_Data):
    """Texts side by side: unsteered, steered, random control."""

    kind: Literal["compare"] = "compare"
    items: tuple[Continuation, ...] = Field(min_length=1)
    prompt: str = ""
    caption: str = ""


class EffectBlock(_Data):
    """An effect drawn beside each of its controls on one scale. Without controls the page refuses to be drawn.

    Attributes:
        kind: "effect".
        effect: A `cutaway.artifacts.Effect`, or its JSON.
    """

    kind: Literal["effect"] = "effect"
    effect: EffectJson


class Example(_Data):
    """A text in which a latent is active: tokens and its activation at each."""

    tokens: tuple[str, ...]
    values: tuple[Number, ...]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        _same("values of an example", len(self.values), len(self.tokens))
        return self


class TokenEffect(_Data):
    """How much a latent's decoder direction raises or lowers a token's logit."""

    token: str
    value: Number


class Latent(_Data):
    """A dictionary latent. `density`: share of tokens on which it is active. `auroc` is for telling `concept`."""

    id: int
    label: str
    label_note: str = ""
    density: Number
    top_examples: tuple[Example, ...] = ()
    promotes: tuple[TokenEffect, ...] = ()
    suppresses: tuple[TokenEffect, ...] = ()
    auroc: Number = None
    concept: str | None = None


class Features(_Data):
    kind: Literal["features"] = "features"
    items: tuple[Latent, ...] = Field(min_length=1)


Block = Annotated[
    Text | Figures | Table | Heatmap | Line | Bars | Tokens | Lens | Compare | EffectBlock | Features,
    Field(discriminator="kind"),
]


class Section(_Data):
    """One step of the tour.

    Attributes:
        id: Lower case, such as "lens": the page's anchor.
        title: Its heading.
        question: What a newcomer asks.
        lead: The answer in two plain sentences.
        status: "shown"; "fallback": the model was not good enough at the first choice of task; "not shown";
            "no effect": what was measured does not exceed its controls.
        note: One honest line: limits, a null result, why a fallback was used, or "not shown: right on 3 of 20".
        blocks: What is drawn.
        command: Makes the figures again.
        effects: The section's effects as JSON, each with its controls; those that no block draws are drawn after the
            blocks.
        seconds: How long the step took.
    """

    id: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    title: str
    question: str
    lead: str
    status: Literal["shown", "fallback", "not shown", "no effect"] = "shown"
    note: str = ""
    blocks: tuple[Block, ...] = ()
    command: str = ""
    effects: tuple[EffectJson, ...] = ()
    seconds: float = 0.0

    @model_validator(mode="after")
    def _never_empty(self) -> Self:
        if self.status == "shown" and not (self.blocks or self.effects):
            raise ValueError(f"section {self.id!r} is 'shown' but has nothing to show")
        if self.status != "shown" and not self.note:
            raise ValueError(f"section {self.id!r} is {self.status!r}: its note must say why")
        return self


class SelfTest(_Data):
    """The algebra that the model was checked against.

    Attributes:
        passed: How many checks held.
        total: Of how many.
        detail: The worst error, in words.
    """

    passed: int
    total: int
    detail: str = ""


class Fact(_Data):
    """A fact of a model's architecture.

    Attributes:
        label: "layers", "width", "heads".
        value: A number or a short text.
        units: Of the value.
    """

    label: str
    value: Value
    units: str = ""


class Card(_Data):
    """The model's card.

    Attributes:
        name: The model's.
        identity: Where it came from (hub id, folder or "shipped"), with its weight hash.
        description: A line about it.
        facts: Of its architecture: layers, width, heads, vocabulary.
        parameters: How many.
        context: How many tokens it reads.
        selftest: The checks that it passed.
    """

    name: str
    identity: str
    description: str = ""
    facts: tuple[Fact, ...] = ()
    parameters: int
    context: int | None = None
    selftest: SelfTest | None = None


class TourResult(_Data):
    """A whole tour: everything that `index.html` shows, and `--json` prints.

    Attributes:
        title: Of the page.
        card: The model's.
        sections: In the order of the page.
        manifest: The run's manifest as JSON: id, model and weight hash, corpus hash, seed.
        version: Of cutaway.
        created: ISO 8601.
        total_seconds: How long the tour took.
        configuration: What the user asked for: model, corpus, seed.
    """

    title: str
    card: Card
    sections: tuple[Section, ...]
    manifest: Json = Field(default_factory=dict)
    version: str
    created: str
    total_seconds: float = 0.0
    configuration: Json = Field(default_factory=dict)

    @model_validator(mode="after")
    def _unique_ids(self) -> Self:
        ids = [section.id for section in self.sections]
        if len(set(ids)) != len(ids):
            raise ValueError(f"section ids are not unique: {ids}")
        return self
