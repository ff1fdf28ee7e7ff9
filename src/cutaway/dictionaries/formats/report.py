"""What is in a dictionary's files and whether it fits, as one result: text, JSON, page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import interval_text
from cutaway.dictionaries.formats.files import read
from cutaway.dictionaries.formats.inspection import Alternative, Fit, check_fit, facts
from cutaway.dictionaries.formats.reading import Reading
from cutaway.dictionaries.ports import Models
from cutaway.draw.charts import effects_html, line_svg
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.draw.text import interval


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """What is in a dictionary's files and, where it was measured in a model, how well it fits there."""

    title = "A dictionary's files"

    reading: Reading
    """The dictionary, and how its files were read."""
    facts: dict[str, Any]
    """What needs no model, as plain data: format, kind, size, tensors, folds, sites, expected L0, norms."""
    fit: Fit | None = None
    """How it does in a model; None without one."""
    text: str = ""
    """What the rows were that it was measured on."""

    @property
    def fits(self) -> bool:
        """False where another site or scale does clearly better, or L0 is far from what the files say."""
        return self.fit is None or self.fit.fits

    def summary(self) -> str:
        shown = ("format", "kind", "size", "model", "site, ours", "written to", "folded", "expected L0")
        lines = [f"{label:<12} {value[:100]}" for label, value in _facts(self.facts) if label in shown]
        if self.fit is not None:
            lines += [f"{one.name}: {one.value:.4g} {interval_text(one.interval)}" for one in self.fit.effects[:1]]
            lines += list(self.fit.verdicts[:2])
        return "\n".join(lines)

    def __str__(self) -> str:
        about = _facts(self.facts)
        width = max(len(label) for label, _ in about)
        lines = [f"{label:<{width}}  {value}" for label, value in about]
        lines += ["", *_columns([["tensor", "stored as", "type", "is here"], *_tensor_rows(self.facts)])]
        fit = self.fit
        if fit is None:
            return "\n".join([*lines, "", "give --model to measure how well it fits"])
        lines += ["", f"on {fit.n_tokens:,} tokens of {fit.n_rows} rows, {self.text}:"]
        for effect in fit.effects:
            ends = effect.interval or (None, None)
            lines.append(
                f"  {effect.name}: {interval(effect.value, *ends, digits=4)} {effect.units}; random directions "
                f"{effect.controls[0].value:.4g}"
            )
        rows = _alternative_rows(fit)
        if rows:
            lines += ["", *_columns([["instead", "FVU", "95 %", "L0"], *rows])]
        return "\n".join([*lines, "", *fit.verdicts])

    def to_json(self) -> dict[str, Any]:
        return self.facts | ({} if self.fit is None else {"measured": _measured(self.fit, self.text)})

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"tensor": t["name"], "shape": str(t["shape"]), "dtype": t["dtype"], "becomes": t["becomes"]}
            for t in self.facts["tensors"]
        ]

    def sections(self) -> list[tuple[str, str, Markup]]:
        """Heading, text and drawing of each part: the facts, the tensors, how it fits, and how it does elsewhere."""
        found = self.facts
        sections = [
            (
                "What it is", "",
                table_html(columns=["", ""], rows=[list(line) for line in _facts(found)], title="Facts"),
            ),
            (
                "Its tensors", "As they are stored, and what they are here.",
                table_html(
                    columns=["tensor", "stored as", "type", "is here"], rows=_tensor_rows(found), title="Tensors"
                ),
            ),
        ]  # fmt: skip
        fit = self.fit
        if fit is None:
            return sections
        measured = effects_html(fit.effects)
        about = f"{fit.n_tokens:,} tokens of {fit.n_rows} rows, {self.text}. 95 % bootstrap intervals over rows."
        sections.append(("At the stated site", about, measured))
        rows = _alternative_rows(fit)
        if rows:
            note = (
                "The same weights elsewhere. A dictionary at a wrong site or scale does clearly better at one of these."
            )
            columns = ["instead", "FVU", "95 %", "L0"]
            align = ["left", "right", "right", "right"]
            sections.append(("Elsewhere", note, table_html(columns=columns, rows=rows, title="Elsewhere", align=align)))
        return sections

    def drawing(self) -> Markup:
        """The lengths of the decoder's rows, and the sections."""
        series = []
        for port, block in zip(self.reading.dictionary.outputs, self.reading.dictionary.decoders(), strict=True):
            lengths = block.detach().double().norm(dim=1).cpu().numpy()
            counts, edges = np.histogram(lengths, bins=20, range=(0, 1.02 * lengths.max() or 1.0))
            series.append({"name": port.site, "x": ((edges[1:] + edges[:-1]) / 2).tolist(), "y": counts.tolist()})
        norms = line_svg(series=series, title="Decoder norms", x_label="length of a decoder row", y_label="latents")
        parts = [Markup("<h3>{}</h3><p>{}</p>{}").format(*section) for section in self.sections()]
        return norms + Markup("").join(parts)


def inspect(
    where: str | Path | Reading,
    models: Models | None = None,
    rows: Tensor | None = None,
    *,
    names: Mapping[str, str] | None = None,
    site: str | None = None,
    text: str = "",
    seed: int = 0,
) -> Inspection:
    """What is in a dictionary's files; with a model, how well it fits there, and at the sites and scales around.

    Args:
        where: A folder or file in any format that is read here, or hf://owner/repository/folder.
        models: The model that the dictionary belongs to; for a crosscoder of two models, both. Not measured if None.
        rows: Token ids [n, p] to measure on.
        names: Which tensor is what, where the files do not say: {"W_enc": "encoder.weight"}.
        site: Measure at this site, whatever the files say.
        text: What the rows are, for titles.
        seed: Of the random directions that it is compared with.

    Returns:
        The facts and, with a model, the fit.

    Raises:
        CutawayError: the files are no dictionary, or it has another width than the model's sites.

    Example:
        >>> inspect("atlas/blocks.3.resid_post")
        format       SAELens 6 (with cutaway's block)
        ...
    """
    reading = where if isinstance(where, Reading) else read(where, names)
    if models is None:
        return Inspection(reading, facts(reading))
    if rows is None:
        raise CutawayError("a dictionary is measured on rows of tokens: give rows= beside the model")
    return Inspection(reading, facts(reading), check_fit(models, reading, rows, site=site, seed=seed), text)


def _measured(fit: Fit, text: str) -> dict[str, Any]:
    def alternatives(found: Sequence[Alternative]) -> list[dict[str, Any]]:
        return [
            {"name": one.name, "fvu": one.fvu, "interval": list(one.interval), "l0": one.l0,
             "difference": list(one.difference)}
            for one in found
        ]  # fmt: skip

    return {
        "fits": fit.fits,
        "verdicts": list(fit.verdicts),
        "text": text,
        "n_tokens": fit.n_tokens,
        "n_rows": fit.n_rows,
        "effects": [effect.to_json() for effect in fit.effects],
        "sites": alternatives(fit.sites),
        "scales": alternatives(fit.scales),
    }


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts that are one line each, label and text."""
    sites = [f"{port['site']} [{port['width']}]" for port in found["reads"]]
    lines = [
        ("format", found["format"]),
        ("kind", f"{found['kind'].replace('_', ' ')}, {found['selector']}"),
        ("size", f"{found['d_in']} → {found['d_sae']:,} latents → {found['d_out']}, {found['parameters']:,} parameters "
                 f"in {found['dtype']}, {found['bytes'] / 1e6:,.1f} MB in {len(found['files'])} files"),
        ("model", ", ".join(dict.fromkeys(str(port["model"] or "not named") for port in found["reads"]))),
        ("site, as stored", ", ".join(found["hooks"]) or "not named"),
        ("site, ours", " + ".join(sites)),
    ]  # fmt: skip
    if found["writes"] != found["reads"]:
        lines.append(("written to", " + ".join(f"{port['site']} [{port['width']}]" for port in found["writes"])))
    lines += [
        ("b_dec", "taken off the input" if found["subtracts_b_dec"] else "not taken off the input"),
        ("per-token norm", {"layer_norm": "layer norm", "unit": "unit norm", None: "none"}[found["input_norm"]]),
        ("folded", "; ".join(found["folds"]) or "nothing had to be"),
        ("expected L0", "; ".join(map(_expected, found["expected_l0"])) or "the files do not say"),
    ]
    for site, norms in found["decoder_norms"].items():
        lines.append(("decoder norms" + ("" if site == "all" else f", {site}"), _spread(norms)))
    if found["thresholds"]:
        lines.append(("thresholds", _spread(found["thresholds"])))
    if found["encoder_decoder_cosine"] is not None:
        cosine = f"{found['encoder_decoder_cosine']:.3f}, signed, mean over latents"
        lines.append(("encoder · decoder", cosine))
    lines += [("note", note) for note in found["notes"]]
    return lines


def _expected(one: dict[str, Any]) -> str:
    span = f"{one['value']:.4g}" if one["high"] is None else f"{one['value']:.4g} to {one['high']:.4g}"
    return f"{span} ({one['source']})"


def _spread(found: dict[str, float]) -> str:
    return f"{found['min']:.4g} to {found['max']:.4g}, median {found['median']:.4g}"


def _tensor_rows(found: dict[str, Any]) -> list[list[str]]:
    return [[t["name"], str(t["shape"]), t["dtype"], t["becomes"]] for t in found["tensors"]]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    ]


def _alternative_rows(fit: Fit) -> list[list[str]]:
    return [
        [one.name, f"{one.fvu:.3f}", interval_text(one.interval), f"{one.l0:.1f}"]
        for one in (*fit.sites[:12], *fit.scales)
    ]
