"""How good a dictionary is on rows it was not trained on, beside untrained directions of the same size.

Everything counts the positions that training counts (not the first of a row, no BOS). Each figure comes with its n and
a 95 % bootstrap interval over rows, since tokens of one row are not independent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.data.activations import as_tokens, counted, harvest
from cutaway.dictionaries.dictionary import Dictionary, random_dictionary
from cutaway.model import edits
from cutaway.model.language_model import LanguageModel
from cutaway.model.run import Run

DENSE = 0.1  # a latent that fires on more than this share of tokens is called dense
_ROWS_A_FORWARD = 8

# name: (what it is, units, the sums it is made of)
_FIGURES = {
    "l0": ("active latents a token", "latents"),
    "variance_explained": ("variance explained, 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over all tokens", "share"),
    "cosine": ("cosine of x and x̂", "cosine"),
    "ce_recovered_zero": ("cross-entropy recovered against zero ablation", "share"),
    "ce_recovered_mean": ("cross-entropy recovered against mean ablation", "share"),
    "ce_increase": ("rise of the cross-entropy with x̂ in place of x", "nats"),
    "kl": ("KL(model ‖ model with x̂ in place of x)", "nats"),
}
_SPLICED = ("ce_recovered_zero", "ce_recovered_mean", "ce_increase", "kl")


@dataclass(frozen=True)
class Evaluation:
    """`effects` by name, each beside the random dictionary; `frequency` [F]: share of the tokens on which each fires.

    `dead`: share of latents that never fired on these `n_tokens`; `dense`: share that fire on more than 10 % of them.
    `ce`: mean cross-entropy in nats of the model as it is, and with the site replaced.
    """

    effects: dict[str, Effect]
    frequency: Tensor
    dead: float
    dense: float
    ce: dict[str, float]
    n_rows: int
    n_tokens: int

    def __str__(self) -> str:
        lines = [
            f"{self.n_tokens:,} tokens of {self.n_rows} held-out rows; dead {self.dead:.1%}, dense {self.dense:.1%}"
        ]
        for effect in self.effects.values():
            low, high = effect.interval or (float("nan"), float("nan"))
            lines.append(
                f"  {effect.name}: {effect.value:.4f} [{low:.4f}, {high:.4f}] {effect.units}; random directions "
                f"{effect.controls[0].value:.4f}"
            )
        return "\n".join([*lines, "  cross-entropy: " + ", ".join(f"{name} {ce:.3f}" for name, ce in self.ce.items())])


def evaluate(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Tensor,
    *,
    spliced_rows: int = 32,
    seed: int = 0,
    command: str | None = None,
) -> Evaluation:
    """Judge a dictionary on held-out rows [n, p] of its model.

    Reconstruction figures use all rows; for those of the spliced model the first `spliced_rows` are run again with the
    site set to x̂ (positions that do not count stay as they are), to zero and to the mean. Zero and mean ablation are
    the two usual baselines of CE recovered: (CE_ablated − CE_spliced) / (CE_ablated − CE_clean). The control is a
    dictionary of random unit directions with the same k and a fitted gain. Raises `CutawayError` without rows.
    """
    if not len(rows):
        raise CutawayError("there are no held-out rows to judge the dictionary on")
    mask = counted(rows, lm.bos_id)
    x = harvest(lm, rows, dictionary.site)
    mean = x.mean(0)
    control = random_dictionary(dictionary, x, seed)
    row_of = torch.arange(len(rows))[:, None].expand_as(rows)[mask]
    counts = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=x.device)
    sums = {"trained": _reconstruction(dictionary, x, mean, row_of, len(rows), counts)}
    sums["control"] = _reconstruction(control, x, mean, row_of, len(rows))
    ce: dict[str, float] = {}
    if spliced_rows:
        some = rows[:spliced_rows]
        spliced = _splice_sums(lm, dictionary, control, some, mean)
        for name in sums:
            sums[name] |= spliced[name]
        total = spliced["trained"]["targets"].sum()
        ce = {key: float(spliced["trained"][f"ce_{key}"].sum() / total) for key in ("clean", "zero", "mean", "spliced")}
        ce["random directions"] = float(spliced["control"]["ce_spliced"].sum() / total)
    frequency = counts.double().cpu() / len(x)
    effects = {
        name: _effect(name, sums, command) for name in _FIGURES if name not in _SPLICED or "targets" in sums["trained"]
    }
    return Evaluation(
        effects=effects,
        frequency=frequency,
        dead=float((counts == 0).float().mean()),
        dense=float((frequency > DENSE).float().mean()),
        ce=ce,
        n_rows=len(rows),
        n_tokens=len(x),
    )


Sums = dict[str, np.ndarray]  # each [rows], float64


def _reconstruction(
    dictionary: Dictionary, x: Tensor, mean: Tensor, row_of: Tensor, n_rows: int, counts: Tensor | None = None
) -> Sums:
    """Per row: tokens, active latents, Σ‖x − x̂‖², Σ‖x − x̄‖², Σ cosine. Adds each latent's firings to `counts`."""
    values, latents = dictionary.encode_sparse(x)
    active = values > 0
    if counts is not None:
        counts += torch.bincount(latents[active], minlength=dictionary.d_sae)
    written = dictionary.decode_sparse(values, latents)
    per_token = {
        "tokens": torch.ones(len(x)),
        "active": active.sum(1),
        "error": (x - written).double().square().sum(1),
        "variance": (x - mean).double().square().sum(1),
        "cosine": torch.cosine_similarity(x, written, dim=1),
    }
    return {
        name: np.bincount(row_of.numpy(), weights=column.double().cpu().numpy(), minlength=n_rows)
        for name, column in per_token.items()
    }


def splice(run: Run, dictionary: Dictionary, bos_id: int | None, value: Tensor | None = None) -> edits.Edit:
    """An edit that sets the run's site to its reconstruction, or to `value` [d], where positions count.

    The first position and BOS keep what they had: dictionaries do not see them in training.
    """
    x = run[dictionary.site]
    put = dictionary(x) if value is None else value.expand_as(x)
    keep = counted(run.tokens.ids, bos_id)[..., None].to(x.device)
    return edits.set(dictionary.site, torch.where(keep, put.to(x.dtype), x))


@torch.no_grad()
def _splice_sums(
    lm: LanguageModel, dictionary: Dictionary, control: Dictionary, rows: Tensor, mean: Tensor
) -> dict[str, Sums]:
    """Per row: number of targets, summed cross-entropies clean, zero, mean and spliced, summed KL."""
    parts: dict[str, list[dict[str, Tensor]]] = {"trained": [], "control": []}
    with Progress(f"splicing {dictionary.site}", total=len(rows), unit="rows") as progress:
        for part in _batches(rows):
            tokens = as_tokens(part)
            clean = lm.run(tokens, capture=dictionary.site)
            # a token that is fed at a position that counts is what the site can change the prediction of
            weight = counted(part, lm.bos_id)[:, :-1].double()
            reference = _log_probabilities(clean)
            shared = {"targets": weight.sum(1), "ce_clean": _cross_entropy(reference, part, weight)}
            for name, value in (("zero", torch.zeros_like(mean)), ("mean", mean)):
                ablated = lm.run(tokens, edits=splice(clean, dictionary, lm.bos_id, value), resume=clean)
                shared[f"ce_{name}"] = _cross_entropy(_log_probabilities(ablated), part, weight)
            for name, subject in (("trained", dictionary), ("control", control)):
                found = _log_probabilities(lm.run(tokens, edits=splice(clean, subject, lm.bos_id), resume=clean))
                kl = (reference.exp() * (reference - found)).sum(-1).double().cpu()
                sums = {"ce_spliced": _cross_entropy(found, part, weight), "kl": (kl * weight).sum(1)}
                parts[name].append(shared | sums)
            progress.advance(len(part))
    return {
        name: {key: torch.cat([batch[key] for batch in batches]).numpy() for key in batches[0]}
        for name, batches in parts.items()
    }


def _log_probabilities(run: Run) -> Tensor:
    """Of the next token, [b, p - 1, V]."""
    assert run.logits is not None
    return torch.log_softmax(run.logits[:, :-1].float(), dim=-1)


def _cross_entropy(log_probabilities: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Summed over the targets of each row, in nats: [b]."""
    targets = rows[:, 1:, None].to(log_probabilities.device)
    return -(log_probabilities.gather(-1, targets)[..., 0].double().cpu() * weight).sum(1)


def _batches(rows: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows), _ROWS_A_FORWARD):
        yield rows[start : start + _ROWS_A_FORWARD]


def _figure(name: str, table: np.ndarray, columns: Sequence[str]) -> float:
    """A figure of some rows: `table` [rows, columns] holds their sums. Ratios are of sums, so over all tokens alike."""
    total = dict(zip(columns, table.sum(0), strict=True))
    if name == "l0":
        return total["active"] / total["tokens"]
    if name == "variance_explained":
        return 1 - total["error"] / total["variance"]
    if name == "cosine":
        return total["cosine"] / total["tokens"]
    if name == "ce_increase":
        return (total["ce_spliced"] - total["ce_clean"]) / total["targets"]
    if name == "kl":
        return total["kl"] / total["targets"]
    ablated = total["ce_zero" if name == "ce_recovered_zero" else "ce_mean"]
    return (ablated - total["ce_spliced"]) / (ablated - total["ce_clean"])


def _effect(name: str, sums: dict[str, Sums], command: str | None) -> Effect:
    spliced = name in _SPLICED
    needed = ("targets", "ce_clean", "ce_zero", "ce_mean", "ce_spliced", "kl")
    columns = list(needed) if spliced else ["tokens", "active", "error", "variance", "cosine"]
    found = {}
    for who, values in sums.items():
        table = np.stack([values[column] for column in columns], axis=1)
        interval = bootstrap_interval(table, lambda some: _figure(name, some, columns), n_resamples=1000)
        found[who] = (_figure(name, table, columns), interval, len(table))
    value, interval, n = found["trained"]
    control, control_interval, _ = found["control"]
    label, units = _FIGURES[name]
    return Effect(
        name=label,
        value=value,
        n=n,
        interval=interval,
        controls=(Control("random directions, same size and k", control, control_interval, n),),
        ablation={"ce_recovered_zero": "zero ablation", "ce_recovered_mean": "mean ablation"}.get(
            name, "site set to the reconstruction" if spliced else "none"
        ),
        units=units,
        command=command,
    )
