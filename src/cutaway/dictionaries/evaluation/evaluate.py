"""How good a dictionary is on rows it was not trained on, beside untrained directions of the same size.

Any selector, any kind: x is what is read and x̂ what is written in place of y, which is x for an SAE and a crosscoder
and another site's value for a transcoder. Everything counts the positions that training counts (not the first of a row,
no BOS). Each figure comes with its n and a 95 % interval over rows and seeds (see `figures.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Effect
from cutaway.data.harvesting.activations import as_tokens
from cutaway.dictionaries.dictionary import Dictionary, random_dictionary
from cutaway.dictionaries.evaluation.figures import (
    RECONSTRUCTION,
    SPLICED,
    Tables,
    effect,
    figure_line,
    figure_rows,
    statistics_of,
)
from cutaway.dictionaries.evaluation.latents import DENSE, density_svg
from cutaway.dictionaries.ports import ModelPorts, Models, PortValues, batches, harvest_ports, model_ports
from cutaway.dictionaries.selectors import ReLU
from cutaway.draw.charts import effects_html
from cutaway.draw.result import Result
from cutaway.model.forward.run import Run
from cutaway.model.tokens import next_tokens

RANDOM = "random directions, same size and L0"
AFFINE = "affine map, least squares on these tokens"
ALL = ""  # the scope of figures over everything that is written

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """How good one dictionary is, every figure beside its controls."""

    title = "A dictionary on held-out text"

    effects: dict[str, Effect]
    """By name: "l0", "variance_explained", "fvu", "cosine", "norm_ratio", and of the model with the reconstruction in
    place "ce_recovered_zero", "ce_recovered_mean", "ce_increase", "kl_recovered_zero", "kl_recovered_mean", "kl"."""
    frequency: Tensor
    """The share of the tokens on which each latent is active, float64 [F]."""
    dead: float
    """The share of latents that are active on none of the tokens."""
    dense: float
    """The share of latents that are active on more than 10 % of them."""
    ce: dict[str, float]
    """Mean cross-entropy in nats of the model as it is ("clean"), and with the site replaced."""
    n_rows: int
    """Held-out rows."""
    n_tokens: int
    """Tokens that were counted."""
    parts: dict[str, dict[str, Effect]] = field(default_factory=dict)
    """A crosscoder's figures output by output and, where there are several, model by model; `effects` are over all of
    them together."""

    def _lines(self, effects: Iterable[Effect]) -> str:
        lines = [
            f"{self.n_tokens:,} tokens of {self.n_rows} held-out rows; dead {self.dead:.1%}, dense {self.dense:.1%}"
        ]
        lines += [f"  {figure_line(one)}" for one in effects]
        return "\n".join([*lines, "  cross-entropy: " + ", ".join(f"{name} {ce:.3f}" for name, ce in self.ce.items())])

    def summary(self) -> str:
        return self._lines(one for name, one in self.effects.items() if name != "fvu")

    def __str__(self) -> str:
        return self._lines(one for some in (self.effects, *self.parts.values()) for one in some.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.n_rows,
            "tokens": self.n_tokens,
            "dead": self.dead,
            "dense": self.dense,
            "effects": {name: one.to_json() for name, one in self.effects.items()},
            "parts": {part: {name: one.to_json() for name, one in some.items()} for part, some in self.parts.items()},
            "cross_entropy": self.ce,
        }

    def rows(self) -> list[dict[str, Any]]:
        scopes = {ALL: self.effects, **self.parts}
        return [{"of": scope or "all", **row} for scope, some in scopes.items() for row in figure_rows(some.items())]

    def drawing(self) -> Markup:
        return density_svg({"this dictionary": self.frequency}, self.n_tokens) + effects_html(self.effects.values())


def evaluate(
    models: Models,
    dictionary: Dictionary,
    rows: Tensor,
    *,
    spliced_rows: int = 32,
    high_norm: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """How good a dictionary is on rows it was not trained on.

    Reconstruction figures use all rows; for those of the spliced model the first `spliced_rows` are run again with
    every site that is written set to x̂ at once (positions that do not count stay as they are), to zero and to the mean.
    Zero and mean ablation are the two usual baselines of what is recovered: (CE_ablated − CE_spliced) / (CE_ablated −
    CE_clean), and (KL_ablated − KL_spliced) / KL_ablated. The control is a dictionary of random unit directions with
    the same L0 and a fitted gain; for a transcoder also the best affine map, which has no latents at all.

    Args:
        models: The model that the dictionary belongs to; for a crosscoder of two models, both.
        dictionary: Of any kind.
        rows: Held-out token ids [n, p].
        spliced_rows: How many of the rows are run again with the reconstruction in place; 0 leaves those figures out.
        high_norm: Leave out positions whose vector is longer than so many times the site's median.
        seed: Of the random directions.

    Returns:
        Figures with 95 % intervals over rows, beside their controls.

    Raises:
        CutawayError: there are no rows, the models are not the dictionary's, or a value is not finite.

    Example:
        >>> lm, dictionary = cutaway.load("atlas"), load("atlas/blocks.3.resid_post")
        >>> texts = [f"{i}. The capital of Texas is Austin, and Dallas lies in Texas." for i in range(30)]
        >>> rows = cutaway.data.token_rows(lm, texts, context=32)
        >>> figures = evaluate(lm, dictionary, rows, spliced_rows=2)
        >>> round(figures.effects["l0"].value)
        32
    """
    measured = measure(models, [dictionary], rows, spliced_rows=spliced_rows, high_norm=high_norm, seed=seed)
    frequency = measured.frequency()[0]
    parts = {scope: measured.effects(scope)[0] for scope in measured.trained if scope != ALL}
    return Evaluation(
        effects=measured.effects(ALL)[0],
        frequency=frequency,
        dead=float((frequency == 0).float().mean()),
        dense=float((frequency > DENSE).float().mean()),
        ce=measured.cross_entropies(),
        n_rows=len(rows),
        n_tokens=measured.n_tokens,
        parts=parts,
    )


# Measuring several dictionaries at once -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowSums:
    """Per-row sums of S dictionaries and of their controls, for everything together ("") and part by part.

    `trained[scope][kind]` and `controls[name][scope][kind]` are tables [S, rows, columns] (`kind` is "reconstruction"
    or "spliced", see `figures.py`); `counts` [S, F]: on how many of the tokens each latent was active, and likewise
    those of the controls. `values` are the activations.
    """

    trained: dict[str, dict[str, Tables]]
    controls: dict[str, dict[str, dict[str, Tables]]]
    counts: Tensor
    control_counts: dict[str, Tensor]
    values: PortValues
    ports: ModelPorts

    @property
    def n_tokens(self) -> int:
        return len(self.values.x)

    def frequency(self) -> Tensor:
        """Share of the tokens on which each latent is active, float64 [S, F]."""
        return self.counts.double() / self.n_tokens

    def effects(self, scope: str = ALL) -> tuple[dict[str, Effect], dict[str, tuple[float, ...]]]:
        """The figures of one scope by name, and each dictionary's own values."""
        effects: dict[str, Effect] = {}
        each: dict[str, tuple[float, ...]] = {}
        for kind, columns in (("reconstruction", RECONSTRUCTION), ("spliced", SPLICED)):
            table = self.trained[scope].get(kind)
            if table is None:
                continue
            others = {name: scopes[scope][kind] for name, scopes in self.controls.items()}
            for name, statistic in statistics_of(columns).items():
                if name == "l0" and scope != ALL:
                    continue  # a latent is active for all parts at once
                of = f"at {scope}" if scope else ""
                effects[name], each[name] = effect(name, table, others, statistic, of=of)
        return effects, each

    def cross_entropies(self) -> dict[str, float]:
        """Mean cross-entropy in nats, clean and with the sites replaced; empty where nothing was spliced."""
        table = self.trained[ALL].get("spliced")
        if table is None:
            return {}
        at = {name: place for place, name in enumerate(SPLICED)}
        sums = table.mean(0).sum(0)
        found = {name: sums[at[f"ce_{name}"]] / sums[at["targets"]] for name in ("clean", "zero", "mean", "spliced")}
        for name, scopes in self.controls.items():
            other = scopes[ALL]["spliced"].mean(0).sum(0)
            found[name.split(",")[0]] = other[at["ce_spliced"]] / other[at["targets"]]
        return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def measure(
    models: Models,
    dictionaries: Sequence[Dictionary],
    rows: Tensor,
    *,
    spliced_rows: int = 32,
    high_norm: float | None = None,
    seed: int = 0,
) -> RowSums:
    """The sums that figures are made of, for dictionaries of the same sites; each gets a control of its own seed.

    Activations, the clean run and the ablations are computed once for all. Raises as `evaluate`, and when the
    dictionaries do not read and write the same.
    """
    if not len(rows):
        raise CutawayError("there are no held-out rows to judge the dictionary on")
    if not dictionaries:
        raise CutawayError("there is no dictionary to judge")
    first = dictionaries[0]
    for other in dictionaries[1:]:
        if _ports(other) != _ports(first) or other.d_sae != first.d_sae:
            raise CutawayError(
                f"{other} and {first} differ in more than their seed: judge dictionaries of one size and of the same "
                "sites together"
            )
    where = model_ports(models, first)
    values = harvest_ports(models, first, rows, high_norm=high_norm, where=where)
    subjects = {"": list(dictionaries), **_controls(dictionaries, values, seed)}
    mean = values.y.mean(0)
    scopes = {ALL: slice(0, first.d_out)}
    if len(where.outputs) > 1:
        end = 0
        for label, port in zip(where.labels(), where.outputs, strict=True):
            scopes[label] = slice(end, end + port.width)
            end += port.width
    tables: dict[str, dict[str, dict[str, Tables]]] = {}
    counts: dict[str, Tensor] = {}
    for name, some in subjects.items():
        found = [_reconstruction(one, values, mean, scopes) for one in some]
        tables[name] = {scope: {"reconstruction": np.stack([sums[scope] for sums, _ in found])} for scope in scopes}
        counts[name] = torch.stack([count for _, count in found])
    if spliced_rows:
        for name, by_scope in _spliced(where, subjects, rows[:spliced_rows], values, mean).items():
            for scope, table in by_scope.items():
                tables[name].setdefault(scope, {})["spliced"] = table
    trained, trained_counts = tables.pop(""), counts.pop("")
    return RowSums(trained, tables, trained_counts, counts, values, where)


def _ports(dictionary: Dictionary) -> tuple[tuple[str, int], ...]:
    return tuple((port.site, port.width) for port in (*dictionary.inputs, *dictionary.outputs))


def _controls(dictionaries: Sequence[Dictionary], values: PortValues, seed: int) -> dict[str, list[Dictionary]]:
    target = None if dictionaries[0].writes_what_it_reads else values.y
    found = {RANDOM: [random_dictionary(one, values.x, seed + i, target) for i, one in enumerate(dictionaries)]}
    if target is not None:
        found[AFFINE] = [affine_dictionary(dictionaries[0], values.x, values.y)] * len(dictionaries)
    return found


def affine_dictionary(like: Dictionary, x: Tensor, y: Tensor) -> Dictionary:
    """The best affine map from x [n, d_in] to y [n, d_out], as a dictionary whose one latent is never active.

    What a transcoder explains beyond it is what its latents are for. Fitted on the tokens that it is judged on, which
    flatters it (a little, where there are many more tokens than dimensions).
    """
    mean_in, mean_out = x.double().mean(0), y.double().mean(0)
    solution = torch.linalg.lstsq(x.double() - mean_in, y.double() - mean_out)
    weight = solution.solution.T.to(like.W_dec)  # [d_out, d_in]
    return Dictionary(
        W_enc=torch.zeros_like(like.W_enc[:, :1]),
        b_enc=-torch.ones_like(like.b_enc[:1]),
        W_dec=torch.zeros_like(like.W_dec[:1]),
        b_dec=mean_out.to(like.b_dec) - weight @ mean_in.to(weight),
        selector=ReLU(),
        site=like.site,
        model=like.model,
        metadata={"control": AFFINE},
        reads=like.inputs,
        writes=like.outputs,
        subtract_b_dec=False,
        W_skip=weight,
    )


def _reconstruction(
    dictionary: Dictionary, values: PortValues, mean: Tensor, scopes: Mapping[str, slice]
) -> tuple[dict[str, Tables], Tensor]:
    """Per scope and row the columns of `RECONSTRUCTION`, [rows, columns]; and on how many tokens each latent is active,
    int64 [F].
    """
    counts = torch.zeros(dictionary.d_sae, dtype=torch.int64)
    per_token = {scope: torch.empty(len(values.x), len(RECONSTRUCTION), dtype=torch.float64) for scope in scopes}
    for start in range(0, len(values.x), _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        x, y = values.x[some], values.y[some]
        activations, latents = dictionary.encode_sparse(x)
        active = activations > 0
        counts += torch.bincount(latents[active], minlength=dictionary.d_sae).cpu()
        written = dictionary.decode_sparse(activations, latents, x).float()
        for scope, part in scopes.items():
            there, put = y[:, part], written[:, part]
            columns = (
                torch.ones(len(x)),
                active.sum(1),
                (there - put).double().square().sum(1),
                (there - mean[part]).double().square().sum(1),
                torch.cosine_similarity(there, put, dim=1),
                there.norm(dim=1),
                put.norm(dim=1),
            )
            per_token[scope][some] = torch.stack([column.double().cpu() for column in columns], dim=1)
    row_of, n_rows = values.row_of, len(values.keep)
    sums = {
        scope: torch.zeros(n_rows, len(RECONSTRUCTION), dtype=torch.float64).index_add(0, row_of, table).numpy()
        for scope, table in per_token.items()
    }
    return sums, counts


def _spliced(
    where: ModelPorts, subjects: Mapping[str, Sequence[Dictionary]], rows: Tensor, values: PortValues, mean: Tensor
) -> dict[str, dict[str, Tables]]:
    """Per subject and scope (all models together, and each of several) the columns of `SPLICED`: [S, rows, columns]."""
    names = where.model_names()
    scopes = [ALL, *(f"the logits of {name}" for name in names)] if len(names) > 1 else [ALL]
    found = {
        name: {scope: np.zeros((len(some), len(rows), len(SPLICED))) for scope in scopes}
        for name, some in subjects.items()
    }
    with Progress("splicing", total=len(rows), unit="rows") as progress:
        for part in batches(len(rows)):
            keep = values.keep[part][: len(rows[part])]
            runs = where.run(rows[part], logits=True)
            judge = _Splicing(where, rows[part], keep, runs)
            x = where.read(runs, keep)
            n = len(x)
            shared = {
                "zero": judge(torch.zeros(n, len(mean), device=mean.device)),
                "mean": judge(mean.expand(n, -1)),
            }
            done: dict[int, np.ndarray] = {}  # a control may serve several dictionaries
            for name, some in subjects.items():
                for place, dictionary in enumerate(some):
                    if id(dictionary) not in done:
                        done[id(dictionary)] = judge(dictionary(x).float())
                    columns = judge.columns(shared, done[id(dictionary)])  # [models, rows, columns]
                    found[name][ALL][place, part] = columns.sum(0)
                    for number, scope in enumerate(scopes[1:]):
                        found[name][scope][place, part] = columns[number]
            progress.advance(len(rows[part]))
    return found


class _Splicing:
    """Runs a batch of rows again with something else at the written sites, and sums what that does to predictions."""

    def __init__(self, where: ModelPorts, rows: Tensor, keep: Tensor, runs: Sequence[Run]) -> None:
        self.where, self.rows, self.keep, self.runs = where, rows, keep, runs
        # a token that is fed at a position that counts is what the site can change the prediction of
        real, answers = torch.ones_like(rows, dtype=torch.bool), min(lm.d_vocab for lm in where.models)
        self.following, answered = next_tokens(rows, real, answers)
        self.weight = (keep[:, :-1] & answered).double()
        self.reference = [_log_probabilities(run) for run in runs]
        self.clean = np.stack([self._cross_entropy(one) for one in self.reference])

    def __call__(self, put: Tensor) -> np.ndarray:
        """Summed cross-entropy and KL of each model and row with `put` [n, d_out] spliced in: [models, rows, 2]."""
        edits = self.where.splice(self.runs, self.keep, put)
        found = []
        for lm, run, some, reference in zip(self.where.models, self.runs, edits, self.reference, strict=True):
            if not some:  # a model that is only read
                found.append(np.stack([self._cross_entropy(reference), np.zeros(len(self.rows))], axis=-1))
                continue
            changed = _log_probabilities(lm.run(as_tokens(self.rows), edits=some, resume=run))
            kl = (reference.exp() * (reference - changed)).sum(-1).double().cpu()
            found.append(np.stack([self._cross_entropy(changed), (kl * self.weight).sum(1).numpy()], axis=-1))
        return np.stack(found)

    def columns(self, shared: Mapping[str, np.ndarray], found: np.ndarray) -> np.ndarray:
        """The columns of `SPLICED`: [models, rows, columns]."""
        targets = np.broadcast_to(self.weight.sum(1).numpy(), self.clean.shape)
        values = {
            "targets": targets,
            "ce_clean": self.clean,
            "ce_zero": shared["zero"][..., 0],
            "ce_mean": shared["mean"][..., 0],
            "ce_spliced": found[..., 0],
            "kl_zero": shared["zero"][..., 1],
            "kl_mean": shared["mean"][..., 1],
            "kl": found[..., 1],
        }
        return np.stack([values[name] for name in SPLICED], axis=-1)

    def _cross_entropy(self, log_probabilities: Tensor) -> np.ndarray:
        """Summed over the targets of each row, in nats: [rows]."""
        targets = self.following[..., None].to(log_probabilities.device)
        losses = -log_probabilities.gather(-1, targets)[..., 0].double().cpu()
        return (losses * self.weight).sum(1).numpy()


def _log_probabilities(run: Run) -> Tensor:
    """Of the next token, [b, p - 1, V]."""
    return torch.log_softmax(run.all_logits[:, :-1].float(), dim=-1)
