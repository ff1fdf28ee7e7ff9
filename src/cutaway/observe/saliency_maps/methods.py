"""Classical saliency: how much each token of a prompt matters to an answer, by three methods older than circuits.

    gradient × input       Σ_d x_d ∂f/∂x_d at each token's embedding x
    integrated gradients   Σ_d (x_d − x'_d) ∫₀¹ ∂f/∂x_d (x' + α(x − x')) dα (Sundararajan et al. 2017); the sum over
                           tokens is f(x) − f(x')
    occlusion              f(x) − f(x with the token replaced, or taken out) (Zeiler & Fergus 2014)

f is an answer's logit, or its difference to a wrong answer's, at the last token. Each method stands beside the
randomised-weights check of Adebayo et al. 2018 (`report.py`): a map that an untrained model gives as well is not
about what the model has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.draw.page import Section, sections_html
from cutaway.draw.result import Result
from cutaway.draw.tokens import TokenRow, tokens_html
from cutaway.model.edits.edits import set as put
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.naming import single_token
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.answers import Wrong, WrongAnswer, differences, in_words, wrong_ids
from cutaway.observe.summaries import block, sentence

Method = Literal["gradient-x-input", "integrated-gradients", "occlusion"]
METHODS: tuple[Method, ...] = get_args(Method)
Baseline = Literal["zero", "pad", "mean", "delete"]
MOST_STEPS = 4096  # the points of a quadrature take a matrix of their square
_ROWS_A_FORWARD = 32
_MOST_STEPS = 1024

NOT_SHOWN: dict[str, str] = {
    "gradient-x-input": (
        "It is a slope at one point: where the answer is already certain the slope is flat and what matters gets "
        "nothing, and a slope is not the effect of taking the token away."
    ),
    "integrated-gradients": (
        "It explains the difference to its baseline, so another baseline gives another map; the straight way there "
        "leads through embeddings that no text has, and effects of tokens together are shared out along it."
    ),
    "occlusion": (
        "It takes away one token at a time: of two tokens that say the same, neither seems to matter, and the prompt "
        "with a hole is unlike anything the model was trained on."
    ),
}


@dataclass(frozen=True, eq=False, repr=False)
class TokenAttribution(Result):
    """What each token of one prompt adds to the metric. `print` writes every token, `repr` the largest."""

    title: ClassVar[str] = "What each token adds to an answer"

    method: Method
    """The method."""
    baseline: Baseline | None
    """What stands in for a token, where the method has that."""
    tokens: tuple[str, ...]
    """The p tokens of the prompt."""
    values: np.ndarray
    """In logits, float64 [p]."""
    value: float
    """The metric of the prompt, in logits."""
    baseline_value: float | None
    """The metric of the baseline (integrated gradients only)."""
    steps: int | None
    """Points of the integral (integrated gradients only)."""
    what: str
    """What is attributed, in words."""

    def summary(self) -> str:
        """The metric, and the tokens that add most to it."""
        first, _, rest = str(self).partition("\n")
        words, _, gap = rest.partition("\n")
        return block([first, *sentence(words.strip(), 6), *([gap] if gap else [])])

    def rows(self) -> list[dict[str, Any]]:
        """One row per token."""
        return [
            {"position": i, "token": token, "value": float(value), "method": self.method, "baseline": self.baseline}
            for i, (token, value) in enumerate(zip(self.tokens, self.values, strict=True))
        ]

    def drawing(self) -> Markup:
        """The tokens, tinted by what they add."""
        return sections_html([map_section([self], self.method, NOT_SHOWN[self.method])])

    @property
    def gap(self) -> float | None:
        """How far the sum is from f(x) − f(x'), where the method promises that: 0 when the integral is exact."""
        if self.baseline_value is None:
            return None
        return float(self.values.sum()) - (self.value - self.baseline_value)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "baseline": self.baseline,
            "what": self.what,
            "tokens": list(self.tokens),
            "values": self.values.tolist(),
            "value": self.value,
            "baseline_value": self.baseline_value,
            "gap": self.gap,
            "steps": self.steps,
        }

    def __str__(self) -> str:
        how = self.method + (f" (baseline: {self.baseline})" if self.baseline else "")
        words = "  ".join(f"{t.strip() or t!r} {v:+.2f}" for t, v in zip(self.tokens, self.values, strict=True))
        gap = "" if self.gap is None else f"\n  sum off by {self.gap:+.2g} with {self.steps} steps"
        return f"{how}: {self.what} {self.value:.3f}\n  {words}{gap}"


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt and what is asked of it: the answer's token, and what its logit is compared with."""

    ids: tuple[int, ...]
    """The prompt's ids."""
    tokens: tuple[str, ...]
    """Its tokens."""
    answer: int
    """The answer's id."""
    wrong: Wrong
    """What its logit is compared with."""
    what: str
    """What is asked, in words."""

    def metric(self, logits: Tensor) -> Tensor:
        """The metric of rows of this prompt, or of edited ones.

        Args:
            logits: at the last token [b, V].

        Returns:
            [b], in logits.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wrongs: list[Wrong] = [self.wrong] * len(logits)
        return differences(wide, [self.answer] * len(logits), wrongs)


def question(
    lm: LanguageModel, prompt: Inputs, answer: str | int, wrong: WrongAnswer = None, *, bos: bool | None = None
) -> Question:
    """A prompt with its answer and what that is compared with.

    Args:
        lm: the model.
        prompt: one text, or its ids.
        answer: one token: an id, "#422", or the text by which one token continues the prompt.
        wrong: a token, several (their mean), "mean" (over the vocabulary), or None: the answer's logit alone.
        bos: whether a beginning-of-text token stands before the text; the tokenizer's own habit if None.

    Raises:
        CutawayError: more than one prompt, an answer that is not one token, an answer that is its own wrong one.
    """
    tokens = lm.tokens(prompt, bos=bos)
    if len(tokens) != 1:
        raise CutawayError(f"Saliency is of one prompt at a time; got {len(tokens)}.")
    if tokens.row_ids(0) == [lm.bos_id]:
        raise CutawayError("The prompt is a beginning-of-text alone, so there is no token to attribute to; give text.")
    prompt_ids = tokens.row_ids(0)
    right = single_token(lm, answer, after=prompt_ids)
    other = wrong_ids(lm, wrong, [prompt_ids])[0]
    if isinstance(other, list) and right in other:
        raise CutawayError(f"The answer {answer!r} is also the wrong answer; give two that differ.")
    name = lm.token_strings([right])[0]
    versus = in_words(lm, other)
    what = f"logit of {name!r}" + (f" minus {versus}" if versus else "")
    return Question(tuple(tokens.row_ids(0)), tuple(tokens.strings[0]), right, other, what)


def saliency_map(
    lm: LanguageModel, asked: Question, method: Method, *, baseline: Baseline = "mean", steps: int | None = None
) -> TokenAttribution:
    """One method on one question.

    Args:
        lm: the model.
        asked: what `question` gives.
        method: "gradient-x-input", "integrated-gradients" or "occlusion".
        baseline: what stands in for a token: "zero", "pad", "mean", or (occlusion alone) "delete".
        steps: points of the integral; as many as it needs if None.

    Raises:
        CutawayError: an unknown method or baseline.
    """
    if method == "gradient-x-input":
        return gradient_x_input(lm, asked)
    if method == "integrated-gradients":
        return integrated_gradients(lm, asked, baseline=baseline, steps=steps)
    if method == "occlusion":
        return occlusion(lm, asked, replace=baseline)
    raise CutawayError(f"There is no saliency method {method!r}; use one of {', '.join(METHODS)}.")


def baseline_vector(lm: LanguageModel, baseline: Baseline) -> Tensor:
    """What stands in for a token's embedding, [d]: zeros, the padding token's, or the mean of the vocabulary's."""
    if baseline == "zero":
        return torch.zeros(lm.d_model, dtype=lm.dtype, device=lm.device)
    if baseline == "pad":
        if lm.pad_id is None:
            raise NotSupported(f"{lm.name} has no padding token; take the baseline mean or zero.")
        return lm.run([[lm.pad_id]], capture="embed", logits=None)["embed"][0, 0]
    if baseline == "mean":
        total = torch.zeros(lm.d_model, dtype=torch.float64, device=lm.device)
        width = min(lm.context_length, 256)
        for start in range(0, lm.d_vocab_in, width):
            row = list(range(start, min(start + width, lm.d_vocab_in)))
            ids = Tokens.whole(torch.tensor([row]), ((),))
            total += lm.run(ids, capture="embed", logits=None)["embed"][0].double().sum(0).to(total.device)
        return (total / lm.d_vocab_in).to(lm.dtype)
    raise CutawayError(f"There is no baseline embedding {baseline!r}; use zero, pad or mean.")


def gradient_x_input(lm: LanguageModel, asked: Question) -> TokenAttribution:
    """Σ_d x_d ∂f/∂x_d per token: first-order effect of scaling its embedding.

    Args:
        lm: the model.
        asked: what `question` gives.
    """
    embeddings, slopes, values = _gradients(lm, asked, None)
    found = (embeddings.double() * slopes.double()).sum(-1)[0]
    return TokenAttribution(
        "gradient-x-input", None, asked.tokens, found.cpu().numpy(), float(values[0]), None, None, asked.what
    )


def integrated_gradients(
    lm: LanguageModel, asked: Question, *, baseline: Baseline = "mean", steps: int | None = None
) -> TokenAttribution:
    """The gradient integrated from a baseline to the prompt (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365).

    By Gauss-Legendre quadrature; `gap` says how far the sum is off. Every token's embedding starts at the baseline, a
    beginning-of-text's too.

    Args:
        lm: the model.
        asked: what `question` gives.
        baseline: "zero", "pad" or "mean".
        steps: points of the integral, 1 to 4096; if None they are doubled from 32 until the sum over tokens is within
            1 % of f(x) − f(x'), or 1,024 are reached.

    Raises:
        CutawayError: too many steps, or an unknown baseline.
    """
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise CutawayError(f"steps is {steps}; the integral takes 1 to {MOST_STEPS}.")
    start = baseline_vector(lm, baseline)
    embeddings, _, value = _gradients(lm, asked, None)
    there = start.expand_as(embeddings)
    way = embeddings - there
    ends = _values(lm, asked, there)
    count = steps or 32
    while True:
        points, weights = np.polynomial.legendre.leggauss(count)
        alphas = torch.tensor((points + 1) / 2, dtype=embeddings.dtype, device=embeddings.device)
        total = torch.zeros(embeddings.shape[1:], dtype=torch.float64, device=embeddings.device)
        for first in range(0, count, _ROWS_A_FORWARD):
            part = alphas[first : first + _ROWS_A_FORWARD]
            _, slopes, _ = _gradients(lm, asked, there + part[:, None, None] * way)
            share = torch.tensor(weights[first : first + _ROWS_A_FORWARD] / 2, device=total.device)
            total += (slopes.double() * share[:, None, None]).sum(0)
        found = TokenAttribution(
            "integrated-gradients",
            baseline,
            asked.tokens,
            (way[0].double() * total).sum(-1).cpu().numpy(),
            float(value[0]),
            float(ends[0]),
            count,
            asked.what,
        )
        assert found.gap is not None
        close = abs(found.gap) <= 0.01 * abs(found.value - float(ends[0]))
        if steps is not None or close or count >= _MOST_STEPS:
            return found
        count *= 2


def occlusion(lm: LanguageModel, asked: Question, *, replace: Baseline = "mean") -> TokenAttribution:
    """How far the metric falls when one token is replaced or deleted, token by token (Zeiler & Fergus 2014).

    A deleted last token makes the one before it the last.

    Args:
        lm: the model.
        asked: what `question` gives.
        replace: what stands in for a token: "zero", "pad", "mean", or "delete".

    Raises:
        CutawayError: a prompt of one token with "delete", or an unknown baseline.
    """
    n = len(asked.ids)
    if replace == "delete":
        if n < 2:
            raise CutawayError("The prompt is one token; deleting it leaves nothing to run.")
        rows = [[token for j, token in enumerate(asked.ids) if j != i] for i in range(n)]
        runs = [lm.run(rows[i : i + _ROWS_A_FORWARD], logits="last") for i in range(0, n, _ROWS_A_FORWARD)]
        without = torch.cat([asked.metric(run.last_logits) for run in runs])
    else:
        without = occluded(lm, asked, [[i] for i in range(n)], baseline_vector(lm, replace))
    value = _values(lm, asked, None)[0]
    found = (value - without).double().cpu().numpy()
    return TokenAttribution("occlusion", replace, asked.tokens, found, float(value), None, None, asked.what)


def occluded(lm: LanguageModel, asked: Question, positions: Sequence[Sequence[int]], vector: Tensor) -> Tensor:
    """The metric with the embeddings of each list of positions replaced by `vector` [d]: one number a list [k]."""
    found = []
    for start in range(0, len(positions), _ROWS_A_FORWARD):
        part = [list(p) for p in positions[start : start + _ROWS_A_FORWARD]]
        rows = lm.tokens([list(asked.ids)]).repeat(len(part))
        logits = lm.run(rows, edits=put("embed", vector, positions=part), logits="last").last_logits
        found.append(asked.metric(logits))
    return torch.cat(found)


def _gradients(lm: LanguageModel, asked: Question, embeddings: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, gradients of the metric there [b, p, d] and the metric [b]: of the prompt, or of other embeddings."""
    tokens = lm.tokens([list(asked.ids)]).repeat(1 if embeddings is None else len(embeddings))
    edits = () if embeddings is None else put("embed", embeddings)
    values: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        found = asked.metric(logits[:, 0])
        values.append(found.detach())
        return found

    run = lm.run(tokens, capture="embed", edits=edits, logits="last", grad=metric)
    return run["embed"], run.grads["embed"], values[0]


def _values(lm: LanguageModel, asked: Question, embeddings: Tensor | None) -> Tensor:
    """The metric [b] of the prompt, or with other embeddings [b, p, d]."""
    tokens = lm.tokens([list(asked.ids)]).repeat(1 if embeddings is None else len(embeddings))
    edits = () if embeddings is None else put("embed", embeddings)
    return asked.metric(lm.run(tokens, edits=edits, logits="last").last_logits)


def map_section(maps: Sequence[TokenAttribution], method: str, not_shown: str) -> Section:
    """The tokens of every prompt, tinted by what they add."""
    rows: list[TokenRow] = []
    for found in maps:
        gap = "" if found.gap is None else f"; the sum is off by {found.gap:+.2g} with {found.steps} steps"
        rows.append(
            {
                "tokens": found.tokens,
                "values": found.values.tolist(),
                "label": f"{found.what}: {found.value:.2f}",
                "detail": f"sum over tokens {found.values.sum():.2f}{gap}",
            }
        )
    baseline = maps[0].baseline
    return (
        method_name(method) + (f" (baseline: {baseline})" if baseline else ""),
        f"What it does not show: {not_shown}",
        tokens_html(rows=rows, units="logits"),
    )


def method_name(method: str) -> str:
    return method.replace("-x-", " × ").replace("-", " ")
