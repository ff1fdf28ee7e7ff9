"""What is in a dictionary's files, and whether it fits the site and the scale that they say.

`facts` needs the files alone. `check_fit` runs a model on some text: how well the dictionary reconstructs the site that
it says it belongs to, beside the sites around it and beside other scales of the activations. A dictionary that is at a
wrong site, or whose weights still want scaled activations, does clearly better elsewhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.data.harvesting.activations import as_tokens, counted
from cutaway.dictionaries import selectors
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, JumpReLU, TopK, random_dictionary
from cutaway.dictionaries.formats.files import at_site
from cutaway.dictionaries.formats.reading import ExpectedL0, Reading
from cutaway.dictionaries.ports import Models, harvest_ports, model_ports
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of

_ROWS_A_FORWARD = 8
_AROUND = (
    "resid_pre", "ln1.normalized", "attn.in", "attn.z", "attn.out", "resid_mid", "ln2.normalized", "mlp.in", "mlp.post",
    "mlp.out", "resid_post",
)  # fmt: skip
_OUTPUTS = ("attn.out", "mlp.out", "resid_mid", "resid_post")
_CLEARLY, _CLEARLY_WITHOUT_L0 = 0.9, 0.5  # of the stated FVU; the second where nothing says which L0 is right


def expected_l0(reading: Reading) -> tuple[ExpectedL0, ...]:
    """How many latents should be active on a token, from everything that says so."""
    dictionary, found = reading.dictionary, list(reading.expected_l0)
    if isinstance(dictionary.selector, TopK | BatchTopK):
        found.insert(0, ExpectedL0(float(dictionary.selector.k), f"k of {dictionary.selector.name}"))
    if dictionary.sparsity is not None:
        found.append(ExpectedL0(float((10 ** dictionary.sparsity.double()).sum()), "summed frequencies of activation"))
    return tuple(found)


def facts(reading: Reading) -> dict[str, Any]:
    """Everything about the files that needs no model, as JSON: tensors, folds, sites, selector, L0, norms, size."""
    dictionary = reading.dictionary
    folder = reading.path if reading.path.is_dir() else reading.path.parent
    files = [reading.path] if reading.path.is_file() else sorted(file for file in folder.iterdir() if file.is_file())
    alignment = None
    if dictionary.writes_what_it_reads:
        alignment = torch.cosine_similarity(dictionary.W_enc.T.float(), dictionary.W_dec.float(), dim=1).mean().item()
    return {
        "path": str(reading.path),
        "format": reading.format,
        "kind": dictionary.kind,
        "selector": selectors.describe(dictionary.selector),
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "d_out": dictionary.d_out,
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "parameters": sum(tensor.numel() for tensor in _weights(dictionary)),
        "bytes": sum(file.stat().st_size for file in files),
        "files": [file.name for file in files],
        "hooks": list(reading.hooks),
        "reads": [_port(port) for port in dictionary.inputs],
        "writes": [_port(port) for port in dictionary.outputs],
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "becomes": t.becomes} for t in reading.tensors
        ],
        "subtracts_b_dec": dictionary.subtract_b_dec,
        "input_norm": dictionary.input_norm,
        "skip": dictionary.W_skip is not None,
        "folds": list(reading.folds),
        "notes": list(reading.notes),
        "expected_l0": [{"value": one.value, "high": one.high, "source": one.source} for one in expected_l0(reading)],
        "decoder_norms": {
            port.site if len(dictionary.outputs) > 1 else "all": _spread(block.float().norm(dim=1))
            for port, block in zip(dictionary.outputs, dictionary.decoders(), strict=True)
        },
        "thresholds": _spread(selector.threshold) if isinstance(selector := dictionary.selector, JumpReLU) else None,
        "encoder_decoder_cosine": alignment,
    }


def _weights(dictionary: Dictionary) -> list[Tensor]:
    own = [getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")]
    return [t for t in (*own, *selectors.tensors_of(dictionary.selector).values()) if t is not None]


def _port(port: Any) -> dict[str, Any]:
    return {"site": port.site, "width": port.width, "model": port.model.get("id")}


def _spread(values: Tensor) -> dict[str, float]:
    quantiles = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=torch.float64)
    found = np.quantile(values.double().cpu().numpy(), quantiles.numpy())
    return dict(zip(("min", "5 %", "median", "95 %", "max"), (float(value) for value in found), strict=True))


@dataclass(frozen=True)
class Alternative:
    """The dictionary at another site or scale."""

    name: str
    """Where."""
    fvu: float
    """The fraction of variance unexplained there."""
    interval: tuple[float, float]
    """Its 95 % interval over rows."""
    difference: tuple[float, float]
    """The 95 % interval of its difference to the FVU at the stated site."""
    l0: float
    """Active latents per token."""


@dataclass(frozen=True)
class Fit:
    """How a dictionary does in a model."""

    effects: tuple[Effect, ...]
    """FVU (1 − variance explained over all tokens), L0 and cosine at the stated site, beside random directions."""
    sites: tuple[Alternative, ...]
    """The same weights at the sites around, by rising FVU."""
    scales: tuple[Alternative, ...]
    """The same weights at other scales of the activations, by rising FVU."""
    verdicts: tuple[str, ...]
    """Sentences that say what is wrong, if anything."""
    fits: bool
    """Whether nothing is."""
    n_rows: int
    """Rows of tokens."""
    n_tokens: int
    """Tokens that were counted."""


@dataclass(frozen=True)
class _Sums:
    """Of each row: Σ‖y − ŷ‖², Σ‖y − ȳ‖², tokens, active latents, Σ cos(y, ŷ). [rows, 5]"""

    table: np.ndarray

    def fvu(self, table: np.ndarray | None = None) -> float:
        total = (self.table if table is None else table).sum(0)
        return float(total[0] / max(total[1], np.finfo(np.float64).tiny))

    def l0(self, table: np.ndarray | None = None) -> float:
        total = (self.table if table is None else table).sum(0)
        return float(total[3] / total[2])

    def cosine(self, table: np.ndarray | None = None) -> float:
        total = (self.table if table is None else table).sum(0)
        return float(total[4] / total[2])


def check_fit(
    models: Models,
    reading: Reading,
    rows: Tensor,
    *,
    site: str | None = None,
    seed: int = 0,
) -> Fit:
    """Measure a dictionary on rows [n, p] of tokens, at the positions that count (not the first of a row, no BOS).

    `site` overrides the one that the files say. The alternatives are the sites around the stated one that have its
    width (every layer's, where none is stated), for a transcoder of what it reads and of what it writes, and the scales
    √d / mean ‖x‖ and its inverse. One is called clearly better when its FVU is below 0.9 of the stated one's, the
    bootstrap interval over rows of the difference does not reach 0, and its L0 is no further from the expected one:
    with more active latents any dictionary fits better (FVU below 0.5 where no L0 is expected). Raises `CutawayError`
    for another width than the model's sites have, and for rows without tokens that count.
    """
    lm = models if isinstance(models, LanguageModel) else models[0]
    dictionary = reading.dictionary if site is None else at_site(reading.dictionary, site)
    if dictionary.W_enc.element_size() < 4:
        dictionary = dictionary.to(dtype=torch.float32)
    stated: _Sums | None = None
    values = None
    known = all(_has(lm, port.site) for port in (*dictionary.inputs, *dictionary.outputs))
    single = len(dictionary.inputs) == 1 and len(dictionary.outputs) == 1
    if known or not single:
        values = harvest_ports(models, dictionary, rows, where=model_ports(models, dictionary))
        stated = _sums(dictionary, values.x, values.y, values.row_of, len(rows))
    keep = counted(rows, lm.bos_id)
    if not keep.any():
        raise CutawayError("no position of these rows counts: they hold nothing but first tokens and BOS")
    sites = _at_sites(lm, dictionary, rows, keep, stated) if single else ()
    scales: tuple[Alternative, ...] = ()
    effects: tuple[Effect, ...] = ()
    verdicts: list[str] = []
    n_tokens = int(keep.sum())
    if values is not None and stated is not None:
        n_tokens = len(values.x)
        if single and dictionary.input_norm is None:
            scales = _at_scales(dictionary, values.x, values.y, values.row_of, len(rows), stated)
        control = random_dictionary(dictionary, values.x, seed, None if dictionary.writes_what_it_reads else values.y)
        effects = _effects(stated, _sums(control, values.x, values.y, values.row_of, len(rows)))
        verdicts += _about_l0(reading, effects[1].value)
    else:
        names = ", ".join(port.site for port in (*dictionary.inputs, *dictionary.outputs))
        verdicts.append(f"the files name no site that this model has ({names})")
    better = _about_alternatives(stated, sites, scales, expected_l0(reading))
    return Fit(
        effects=effects,
        sites=sites,
        scales=scales,
        verdicts=(*verdicts, *better) or ("nothing around the stated site, and no other scale, fits better",),
        fits=not verdicts and not better,
        n_rows=len(rows),
        n_tokens=n_tokens,
    )


def _has(lm: LanguageModel, site: str) -> bool:
    try:
        lm.sites().resolve(site)
    except CutawayError:
        return False
    return True


def _sums(
    dictionary: Dictionary, x: Tensor, y: Tensor, row_of: Tensor, n_rows: int, scales: tuple[float, float] = (1.0, 1.0)
) -> _Sums:
    """Of x [n, d_in] and what should be written, y [n, d_out]; with x times the first scale going in, and what comes
    out divided by the second.
    """
    scaled = x * scales[0]
    values, latents = dictionary.encode_sparse(scaled)
    written = dictionary.decode_sparse(values, latents, scaled).to(y) / scales[1]
    columns = (
        (y - written).double().square().sum(1),
        (y - y.mean(0)).double().square().sum(1),
        torch.ones(len(y)),
        (values > 0).sum(1),
        torch.cosine_similarity(y, written, dim=1),
    )
    rows = row_of.cpu().numpy()
    return _Sums(
        np.stack([np.bincount(rows, column.double().cpu().numpy(), minlength=n_rows) for column in columns], axis=1)
    )


def _alternative(name: str, found: _Sums, stated: _Sums | None) -> Alternative:
    interval = bootstrap_interval(found.table, found.fvu, n_resamples=500)
    difference = (-math.inf, -math.inf)
    if stated is not None:
        both = np.concatenate([found.table, stated.table], axis=1)
        difference = bootstrap_interval(
            both, lambda table: found.fvu(table[:, :5]) - found.fvu(table[:, 5:]), n_resamples=500
        )
    return Alternative(name, found.fvu(), interval, difference, found.l0())


def _at_scales(
    dictionary: Dictionary, x: Tensor, y: Tensor, row_of: Tensor, n_rows: int, stated: _Sums
) -> tuple[Alternative, ...]:
    s_in = x.shape[1] ** 0.5 / x.norm(dim=1).mean().item()
    s_out = y.shape[1] ** 0.5 / y.norm(dim=1).mean().item()
    found = []
    for name, pair in (("times √d / mean norm", (s_in, s_out)), ("times mean norm / √d", (1 / s_in, 1 / s_out))):
        label = f"{name} = {pair[0]:.4g}"
        found.append(_alternative(label, _sums(dictionary, x, y, row_of, n_rows, pair), stated))
    return tuple(sorted(found, key=lambda one: one.fvu))


def _at_sites(
    lm: LanguageModel, dictionary: Dictionary, rows: Tensor, keep: Tensor, stated: _Sums | None
) -> tuple[Alternative, ...]:
    """The dictionary at the sites around, of what it reads and (with that as it is) of what it writes."""
    reads, writes = dictionary.inputs[0], dictionary.outputs[0]
    same = dictionary.writes_what_it_reads
    pairs: list[tuple[str, str, str]] = []  # name, read, written
    if same:
        pairs = [(site, site, site) for site in _around(lm, reads.site, _AROUND) if site != reads.site or not stated]
    else:
        for site in _around(lm, reads.site, _AROUND):
            if _has(lm, writes.site) and site != reads.site:
                pairs.append((f"reading {site}", site, writes.site))
        for site in _around(lm, writes.site, _OUTPUTS):
            if _has(lm, reads.site) and site != writes.site:
                pairs.append((f"writing {site}", reads.site, site))
        if not _has(lm, writes.site) and not _has(lm, reads.site):  # MLP transcoders are the usual ones
            for layer in range(lm.n_layers):
                block = f"blocks.{layer}"
                pairs += [
                    (f"{read} → mlp.out of layer {layer}", f"{block}.{read}", f"{block}.mlp.out")
                    for read in ("mlp.in", "ln2.normalized", "resid_mid")
                    if _has(lm, f"{block}.{read}") and _has(lm, f"{block}.mlp.out")
                ]
    row_of = torch.arange(len(rows))[:, None].expand_as(rows)[keep]
    found = []
    groups = list(_grouped(pairs))
    with Progress("sites around", total=len(groups), unit="layers") as progress:
        for group in groups:
            values = _values(lm, rows, keep, sorted({site for _, *both in group for site in both}))
            for name, read, written in group:
                x, y = values[read], values[written]
                if x.shape[1] == dictionary.d_in and y.shape[1] == dictionary.d_out and torch.isfinite(x).all():
                    found.append(_alternative(name, _sums(dictionary, x, y, row_of, len(rows)), stated))
            progress.advance(1)
    return tuple(sorted(found, key=lambda one: one.fvu))


def _around(lm: LanguageModel, site: str, kinds: Sequence[str]) -> list[str]:
    """Sites of these kinds in the layer of a site, and the stream a layer before and after; of every layer without."""
    layer = layer_of(site)
    if not _has(lm, site) or layer is None:
        layers, near = range(lm.n_layers), []
    else:
        layers = range(layer, layer + 1)
        near = [f"blocks.{other}.resid_post" for other in (layer - 2, layer + 1) if 0 <= other < lm.n_layers]
    inside = [f"blocks.{number}.{kind}" for number in layers for kind in kinds]
    return [name for name in dict.fromkeys([*near, *inside]) if _has(lm, name)]


def _grouped(pairs: Sequence[tuple[str, str, str]]) -> Iterator[list[tuple[str, str, str]]]:
    """Pairs of a layer together, so that the values of only a few sites are held at once."""
    layers = sorted({layer_of(read) or 0 for _, read, _ in pairs})
    for layer in layers:
        yield [pair for pair in pairs if (layer_of(pair[1]) or 0) == layer]


def _values(lm: LanguageModel, rows: Tensor, keep: Tensor, sites: Sequence[str]) -> Mapping[str, Tensor]:
    """Values [n, width] of sites at the positions that count, sites by head flattened, float32."""
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(rows), _ROWS_A_FORWARD):
        some = slice(start, start + _ROWS_A_FORWARD)
        run = lm.run(as_tokens(rows[some]), capture=list(sites), logits=None)
        for site in sites:
            value = run[site].flatten(2)
            parts[site].append(value[keep[some].to(value.device)].float())
    return {site: torch.cat(values) for site, values in parts.items()}


def _effects(stated: _Sums, control: _Sums) -> tuple[Effect, ...]:
    def effect(name: str, units: str, of: str) -> Effect:
        def measured(sums: _Sums) -> tuple[float, tuple[float, float]]:
            statistic = getattr(sums, of)
            return statistic(), bootstrap_interval(sums.table, statistic, n_resamples=1000)

        value, interval = measured(stated)
        n = int((stated.table[:, 2] > 0).sum())
        other, spread = measured(control)
        random = Control("random directions, same size and L0", other, spread, n)
        return Effect(name, value, n, interval, (random,), "none", units)

    return (
        effect("fraction of variance unexplained, Σ‖y − ŷ‖² / Σ‖y − ȳ‖²", "share", "fvu"),
        effect("active latents per token", "latents", "l0"),
        effect("cosine of y and ŷ", "cosine", "cosine"),
    )


def _about_l0(reading: Reading, measured: float) -> list[str]:
    said = []
    for one in expected_l0(reading):
        low, high = one.value, one.value if one.high is None else one.high
        if not low / 2 <= measured <= high * 2:
            span = f"{low:.4g}" if one.high is None else f"{low:.4g} to {high:.4g}"
            said.append(f"{measured:.4g} latents are active on a token where {one.source} says {span}")
    return said


def _about_alternatives(
    stated: _Sums | None,
    sites: Sequence[Alternative],
    scales: Sequence[Alternative],
    expected: Sequence[ExpectedL0],
) -> list[str]:
    if stated is None:
        return [f"the best of the sites with its width is {sites[0].name}: FVU {sites[0].fvu:.3f}"] if sites else []
    own, own_l0 = stated.fvu(), stated.l0()

    def is_better(one: Alternative) -> bool:
        if one.l0 <= 1.1 * own_l0:
            enough = _CLEARLY
        elif expected:
            enough = _CLEARLY if _l0_distance(one.l0, expected) <= _l0_distance(own_l0, expected) else 0.0
        else:
            enough = _CLEARLY_WITHOUT_L0
        return one.fvu < enough * own and one.difference[1] < 0

    clear = [("site", one) for one in sites if is_better(one)] + [("scale", one) for one in scales if is_better(one)]
    if clear:  # only the best is named: at a wrong site another scale may do better too
        kind, best = min(clear, key=lambda one: one[1].fvu)
        what = f"{best.name} fits" if kind == "site" else f"activations {best.name} fit"
        return [
            f"{what} clearly better: FVU {best.fvu:.3f}, L0 {best.l0:.1f}, where the stated {kind} has {own:.3f}, "
            f"{own_l0:.1f}"
        ]
    if own >= 1:
        return [f"FVU is {own:.3f}: it reconstructs no better than the mean does, and no site or scale near fits"]
    return []


def _l0_distance(l0: float, expected: Sequence[ExpectedL0]) -> float:
    """By which factor (as a logarithm) an L0 misses the expectation that it misses least."""
    smallest = 1e-9
    at = math.log(max(l0, smallest))
    ends = [(math.log(max(one.value, smallest)), math.log(max(one.high or one.value, smallest))) for one in expected]
    return min(max(low - at, at - high, 0.0) for low, high in ends)
