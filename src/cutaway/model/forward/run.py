"""What a forward pass returned: logits, captured values, gradients, receipts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NoSuchSite, TooLarge
from cutaway.artifacts.files import take_folder, write_json, write_safetensors
from cutaway.artifacts.manifest import Manifest, ModelIdentity, file_hash, json_hash
from cutaway.model.edits.edit import Edit, Receipt
from cutaway.model.edits.record import FILES as EDIT_FILES
from cutaway.model.edits.record import FORMAT as EDITS
from cutaway.model.familiar import of_run, site_of
from cutaway.model.latents import Latents, is_dictionary, latent_activations
from cutaway.model.sites import SiteTable, template_of
from cutaway.model.tokens import Tokens

CAPTURE_LIMIT = 4 * 2**30  # bytes
FORMAT, VERSION = "cutaway-run", 2


class Gradients(Mapping[str, Tensor]):
    """d metric / d site, a mapping by site name; TransformerLens' spellings find the same."""

    def __init__(self, values: Mapping[str, Tensor], table: SiteTable) -> None:
        self._values = values
        self._table = table

    def __getitem__(self, site: str) -> Tensor:
        name = site if site in self._values else self._table.resolve(site)
        if name not in self._values:
            raise NoSuchSite(f"This run holds no gradient at '{name}'; name it in capture=, with a metric as grad=.")
        return self._values[name]

    def __contains__(self, site: object) -> bool:
        try:
            return isinstance(site, str) and (site in self._values or self._table.resolve(site) in self._values)
        except CutawayError:
            return False

    def get(self, site: str, default: Any = None) -> Any:
        """The gradient at a site, or `default` where there is none."""
        return self[site] if site in self else default  # noqa: SIM401

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _spelled(site: Any, n_layers: int) -> str | None:
    """The name of a site as TransformerLens' caches spell it, ("resid_post", 3); None for other things."""
    if not isinstance(site, tuple) or not site or not isinstance(site[0], str):
        return None
    name, layer, part = site[0], *(*site[1:], None, None)[:2]
    return site_of(name, layer + n_layers if isinstance(layer, int) and layer < 0 else layer, part)


class Captured(Mapping[str, Tensor]):
    """Captured values by site name, as a run and a generation hold them: a mapping from names to tensors."""

    tokens: Tokens
    captured: Mapping[str, Tensor]
    site_table: SiteTable

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return of_run(self, name)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the captured sites, in the order of the forward pass."""
        return tuple(self.captured)

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __bool__(self) -> bool:  # also where nothing was captured
        return True

    def __len__(self) -> int:
        return len(self.captured)

    def __iter__(self) -> Iterator[str]:
        return iter(self.captured)

    def __contains__(self, site: object) -> bool:
        """Whether a site was captured, under our name or TransformerLens'; of a dictionary, the sites that it reads."""
        if is_dictionary(site):
            return all(port.site in self.captured for port in site.inputs)  # type: ignore[attr-defined]
        if isinstance(site, tuple):
            site = _spelled(site, self.site_table.n_layers)
        if not isinstance(site, str):
            return False
        if site in self.captured:
            return True
        try:
            return self.site_table.resolve(site) in self.captured
        except CutawayError:
            return False

    def __getitem__(self, site: str | tuple[Any, ...] | Latents) -> Tensor:
        """A captured value [b, p, ...].

        Args:
            site: a site's name, or TransformerLens' name of it, long or short ("resid_post", 3); or a dictionary, whose
                latent activations [b, p, latents] at the captured site are computed.

        Raises:
            NoSuchSite: a site that was not captured, or that there is not.
        """
        if not isinstance(site, str):
            if is_dictionary(site):
                return latent_activations(site, self)  # type: ignore[arg-type]
            spelled = _spelled(site, self.site_table.n_layers)
            if spelled is None:
                raise NoSuchSite(f"A site is named by text such as 'blocks.3.resid_post'; got {site!r}.")
            site = spelled
        if site in self.captured:
            return self.captured[site]
        name = self.site_table.resolve(site)
        if name not in self.captured:
            held = ", ".join(self.sites[:4]) + (", …" if len(self) > 4 else "") if self.captured else "nothing"
            what = type(self).__name__.lower()
            raise NoSuchSite(f"This {what} did not capture '{name}' (it holds {held}); add it to capture=.")
        return self.captured[name]

    def get(self, site: str | Latents, default: Any = None) -> Any:
        """A captured value, or another where it was not captured.

        Args:
            site: a site's name, ours or TransformerLens', or a dictionary.
            default: what is returned where the site was not captured.
        """
        return self[site] if site in self else default  # noqa: SIM401

    def stack(self, pattern: str) -> Tensor:
        """The captured values that a wildcard names, stacked by layer.

        Args:
            pattern: such as "blocks.*.resid_post".

        Returns:
            [layers, b, ...].

        Raises:
            NoSuchSite: a site that was not captured.
        """
        return torch.stack([self[name] for name in self.site_table.expand(pattern)])

    def last(self, site: str) -> Tensor:
        """A site at each row's last real token.

        Args:
            site: the name of a captured site.

        Returns:
            [b, ...]; at scores and pattern [b, H, k].

        Raises:
            NoSuchSite: a site that was not captured.
        """
        value = self[site]
        if template_of(self.site_table.resolve(site)).endswith((".scores", ".pattern")):
            value = value.transpose(1, 2)
        if value.shape[1] == 1:
            return value[:, 0]
        return value[torch.arange(len(value), device=value.device), self.tokens.last.to(value.device)]


@dataclass(frozen=True, eq=False)
class Run(Captured):
    """One forward pass, and a mapping from site names to captured values: `run[site]`, `run.items()`, `len(run)`.

    Values at padded columns are whatever the model computes there: use `tokens.mask`. Captures are copies and alias
    nothing.

    Attributes:
        tokens: what was run, [b, p].
        logits: [b, p, V], or [b, 1, V] at each row's last real token with logits="last", or None.
        captured: the captured values by site.
        grads: d metric / d site for every captured site, with grad=.
        receipts: what each edit did, one per edit and site.
        edits: the edits that were applied.
        site_table: the model's sites.
        model: the model's name.
        identity: call it for the model's identity when it was run.
        manifest: where a run that was loaded came from; else None.
        strings_of: gives the text of each of some token ids; None without a tokenizer.
        weights: `LanguageModel.weights_state` when it was run; None of a run that was loaded.

    Example:
        run = lm.run("The capital of France is", capture="blocks.*.resid_post")
        {site: value.norm() for site, value in run.items()}
    """

    tokens: Tokens
    logits: Tensor | None
    captured: Mapping[str, Tensor] = field(repr=False)
    grads: Gradients = field(repr=False)
    receipts: tuple[Receipt, ...]
    edits: tuple[Edit, ...]
    site_table: SiteTable = field(repr=False)
    model: str
    identity: Callable[[], ModelIdentity] = field(repr=False)
    manifest: Manifest | None = field(default=None, repr=False)
    strings_of: Callable[[Tensor], list[str]] | None = field(default=None, repr=False)
    weights: int | None = field(default=None, repr=False)

    @property
    def last_logits(self) -> Tensor:
        """The logits at each row's last real token, [b, V].

        Raises:
            CutawayError: a run with `logits=None`.
        """
        logits = self._kept_logits("last")
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits[torch.arange(len(logits), device=logits.device), self.tokens.last.to(logits.device)]

    @property
    def all_logits(self) -> Tensor:
        """The logits at every position, [b, p, V].

        Raises:
            CutawayError: a run that kept the last ones (`logits="last"`), or none.
        """
        logits = self._kept_logits("all")
        if logits.shape[1] != self.tokens.ids.shape[1]:
            raise CutawayError("This run holds the logits at the last tokens alone; run with logits='all'.")
        return logits

    def _kept_logits(self, asked: str) -> Tensor:
        if self.logits is None:
            raise CutawayError(f"This run holds no logits; run with logits='{asked}'.")
        return self.logits

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise CutawayError(
            "A run is neither pickled nor copied; write it with run.save(folder), which cutaway.load_run reads (and a "
            "patch from it with cutaway.save_edits)."
        )

    def save(self, folder: str | Path) -> Path:
        """Write the run into a folder, from which `cutaway.load_run` reads it: tensors (`run.safetensors`), tokens,
        receipts, hashes and manifest (`run.json`), edits (`edits.json`, `edits.safetensors`).

        Args:
            folder: a new or empty folder, or one of an earlier run, which is replaced.

        Returns:
            The folder.

        Raises:
            CutawayError: an edit by a function that is not registered by name.
        """
        from cutaway.model.edits.files import save_edits  # which loads pydantic

        folder = Path(folder)
        for edit in self.edits:
            edit.digest()  # refuses what cannot be saved, before anything is written
        manifest = Manifest.create(
            "run",
            model=self.identity(),
            configuration={
                "tokens": [self.tokens.row_ids(row) for row in range(len(self.tokens))],
                "edits": [edit.digest() for edit in self.edits],
                "sites": list(self.sites),
                "gradients": list(self.grads),
            },
        )
        tensors = {"tokens.ids": self.tokens.ids, "tokens.mask": self.tokens.mask}
        tensors |= {} if self.logits is None else {"logits": self.logits}
        tensors |= {f"value:{name}": value for name, value in self.items()}
        tensors |= {f"grad:{name}": value for name, value in self.grads.items()}
        files = {**dict.fromkeys(("run.json", "run.safetensors"), FORMAT), **dict.fromkeys(EDIT_FILES, EDITS)}
        take_folder(folder, "run", files)
        values = {k: v.contiguous().cpu() for k, v in tensors.items()}
        write_safetensors(folder / "run.safetensors", values, {"format": FORMAT})
        save_edits(folder, self.edits)
        held = [(name, self.site_table[name]) for name in self.sites]
        record = {
            "format": FORMAT,
            "version": VERSION,
            "manifest": manifest.to_json(),
            "model": self.model,
            "n_layers": self.site_table.n_layers,
            "tokens": [list(row) for row in self.tokens.strings],
            "sites": [{"name": n, "dims": s.dims, "meaning": s.meaning, "shape": list(s.shape)} for n, s in held],
            "receipts": [asdict(receipt) for receipt in self.receipts],
        }
        write_json(folder / "run.json", {**record, "hashes": run_hashes(folder, record)})
        return folder

    def __repr__(self) -> str:
        n, width = self.tokens.ids.shape
        lines = [f"Run of {self.model}: {n} row{'s' if n != 1 else ''} x {width} tokens"]
        shown = self.tokens.strings[0]
        text = "".join(shown).replace("\n", "⏎")
        lines.append(f"  row 0   {text if len(text) <= 90 else text[:60] + ' … ' + text[-27:]}")
        if self.logits is not None:
            last = self.logits[0, -1 if self.logits.shape[1] == 1 else int(self.tokens.last[0])].detach().float()
            top = last.softmax(-1).topk(min(3, len(last)))
            names = [f"id {i}" for i in top.indices.tolist()]
            if self.strings_of is not None:
                names = [repr(string) for string in self.strings_of(top.indices)]
            likely = ", ".join(f"{name} {p:.2f}" for p, name in zip(top.values.tolist(), names, strict=True))
            lines.append(f"  logits  {list(self.logits.shape)}; next after row 0: {likely}")
        groups: dict[str, list[str]] = {}
        for name in self.captured:
            groups.setdefault(template_of(name), []).append(name)
        for template, names in groups.items():
            first = names[0] if len(names) == 1 else f"{template.replace('{l}', '*')} ({len(names)} layers)"
            grad = " + gradient" if names[0] in self.grads else ""
            lines.append(f"  site    {first} {list(self.captured[names[0]].shape)}{grad}")
        lines += [f"  edit    {receipt}" for receipt in self.receipts[:6]]
        if len(self.receipts) > 6:
            lines.append(f"  edit    … and {len(self.receipts) - 6} more receipts")
        return "\n".join(lines)


def run_hashes(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the files beside run.json, and of what it says itself."""
    files = {name: file_hash(folder / name) for name in ("run.safetensors", *EDIT_FILES)}
    return {**files, "run.json": json_hash({key: value for key, value in record.items() if key != "hashes"})}


def capture_bytes(table: SiteTable, names: list[str], batch: int, positions: int, itemsize: int) -> int:
    """Bytes that a capture will hold, from the site table alone."""
    sizes = {"b": batch, "p": positions, "q": positions, "k": positions}
    total = 0
    for name in names:
        site = table[name]
        shape = [sizes.get(part, part) if isinstance(part, str) else part for part in site.shape]
        wide = max(4, itemsize) if name.endswith((".scale", ".normalized")) else itemsize
        total += math.prod(int(part) for part in shape) * wide
    return total


def check_capture_size(
    table: SiteTable, names: list[str], batch: int, positions: int, itemsize: int, limit: int
) -> int:
    """Bytes that a capture will hold. Raises CutawayError where they are more than `limit`."""
    if not isinstance(limit, (int, float)) or limit != limit:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"limit_bytes is a number of bytes; got {limit!r}.")
    if limit < 0:
        raise CutawayError(f"limit_bytes is {limit}; give a number of bytes, 0 or more.")
    needed = capture_bytes(table, names, batch, positions, itemsize)
    if needed > limit:
        largest = max(names, key=lambda n: capture_bytes(table, [n], batch, positions, 1))
        raise TooLarge(
            f"This capture would hold {needed / 2**30:.2f} GiB, above the limit of {limit / 2**30:.2f} GiB "
            f"(largest: '{largest}'); capture fewer sites, use fewer or shorter prompts, or raise limit_bytes."
        )
    return needed


@dataclass(frozen=True, eq=False)
class Generation(Captured):
    """What a model wrote, and a mapping from site names to captured values.

    Rows are the prompts, each `num_return_sequences` times in a row. A captured value is in the columns of `tokens`:
    [b, prompt + new, ...], or [b, H, prompt + new, prompt + new] at scores and pattern; 0 at padding, -inf in scores.

    Attributes:
        texts: what is new, up to the end-of-text token, per row.
        new_ids: the new ids, per row.
        prompts: the prompts as tokens.
        tokens: prompt and new tokens together, right padded.
        receipts: what each edit did.
        logprobs: one number per new token: its log-probability under the model (edits included) at temperature 1;
            None with beams.
        captured: the captured values by site.
        edits: the edits that were in force.
        site_table: the model's sites.
        model: the model's name.
        identity: call it for the model's identity when it was run.
    """

    texts: tuple[str, ...]
    new_ids: tuple[tuple[int, ...], ...]
    prompts: Tokens
    tokens: Tokens
    receipts: tuple[Receipt, ...]
    logprobs: tuple[tuple[float, ...], ...] | None = field(repr=False)
    captured: Mapping[str, Tensor] = field(repr=False)
    edits: tuple[Edit, ...]
    site_table: SiteTable = field(repr=False)
    model: str
    identity: Callable[[], ModelIdentity] = field(repr=False)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise CutawayError("A generation is not pickled; keep its texts and new_ids, and values that you need.")

    def __repr__(self) -> str:
        lines = [f"Generation of {len(self.texts)} texts"]
        lines += [f"  {i}: {text!r}" for i, text in enumerate(self.texts[:6])]
        lines += [f"  edit {receipt}" for receipt in self.receipts[:4]]
        return "\n".join(lines)
