"""What goes between page and server, as the OpenAPI document describes it. Every request carries its whole state."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_CHARACTERS = 4000
MOST_TOKENS = 96
MOST_CHANGES = 32


class Wire(BaseModel):
    """Strict records whose docstrings are the document's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Problem(Wire):
    """What was asked cannot be done."""

    error: str
    """Why, and what to do instead, in one sentence."""


class Example(Wire):
    """Two texts to begin with."""

    text: str
    other: str


class ModelCard(Wire):
    """The model that is served."""

    name: str
    architecture: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    parameters: int
    context: int
    dtype: str
    version: str
    """Of cutaway."""
    most_tokens: int
    """The longest text that the page reads, in tokens."""
    examples: list[Example]


class Question(Wire):
    """A text, and what is asked about the token that comes next."""

    text: str = Field(max_length=MOST_CHARACTERS)
    other: str = Field(default="", max_length=MOST_CHARACTERS)
    """A second text, from which values can be patched in; empty for none."""
    answer: str = Field(default="", max_length=100)
    """The answer, one token; the model's own if empty."""
    rival: str = Field(default="", max_length=100)
    """What it is compared with, one token; what the model says to the other text (or its second choice) if empty."""


class Change(Wire):
    """One edit of the run, at a site of the library, as a click makes it."""

    kind: Literal["patch", "mean", "zero", "cut"]
    """The value from the other text; the mean over this text's tokens but the first; zero; 0 at a pattern's key."""
    site: str = Field(max_length=100)
    """Such as "blocks.3.resid_post"."""
    position: int | None = Field(default=None, ge=0)
    """The token, counted from 0; every token if None."""
    head: int | None = Field(default=None, ge=0)
    """A head of the site; all of it if None."""
    key: int | None = Field(default=None, ge=0)
    """For a cut: the token that is no longer looked at."""


class Trial(Question):
    """A question, and edits under which it is asked again."""

    changes: list[Change] = Field(max_length=MOST_CHANGES)


class Look(Trial):
    """One head, whose pattern is wanted under the edits."""

    layer: int = Field(ge=0)
    head: int = Field(ge=0)


class Word(Wire):
    """One token of the vocabulary."""

    id: int
    shown: str
    """Its text with spaces and invisible characters shown."""


class Chance(Word):
    """A token and its probability."""

    p: float


class Lens(Wire):
    """What each layer would say at each token."""

    sites: list[str]
    top: list[list[list[Chance]]]
    """The most probable tokens, `top[site][position]`, the first of them first."""


class Parts(Wire):
    """What each head and MLP writes into the logit difference at the last token."""

    columns: list[str]
    sites: list[list[str]]
    heads: list[list[int | None]]
    values: list[list[float]]
    """`values[layer][column]`, in logits."""
    controls: list[list[float]]
    """The mean |share| of the same part for random pairs of tokens."""
    pairs: int
    """How many random pairs."""
    rest: float
    """What all other parts write (embeddings, biases)."""
    total: float
    """The model's own difference; all parts sum to it."""


class Reading(Wire):
    """A text as the model sees it, without any edit."""

    tokens: list[Word]
    other_tokens: list[Word]
    aligned: list[int | None]
    """For each token the position in the other text that it is patched from; None where it has no counterpart."""
    answer: Word
    rival: Word
    answers: list[Chance]
    """The most probable next tokens."""
    difference: float
    """Logit of the answer minus that of the rival."""
    lens: Lens
    parts: Parts | None
    why_no_parts: str
    """Why this model's answer is not split into parts; empty where it is."""


class Answer(Word):
    """One possible next token, with its probability before and after the edits, and after noise in their places."""

    before: float
    after: float
    control: float


class Shift(Wire):
    """The logit difference before and after the edits, and after noise of the same size in the same places."""

    before: float
    after: float
    control: float
    """Mean over the draws of noise."""
    control_low: float
    control_high: float
    """Least and largest draw."""
    draws: int


class Touched(Wire):
    """What one edit really changed."""

    site: str
    tokens: int
    mean_abs_delta: float
    """Mean |after - before|, in the units of the site."""


class Outcome(Wire):
    """The answer under edits."""

    answers: list[Answer]
    difference: Shift
    lens: Lens
    touched: list[Touched]
    python: str
    """The same experiment in Python."""


class Pattern(Wire):
    """Where one head looks, from each token (a row) to each (a column)."""

    site: str
    values: list[list[float]]
