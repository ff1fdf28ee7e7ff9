"""Patching sweeps of the benchmark: ours, and the obvious one, a forward a cell with hooks and every logit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cutaway
from cutaway.model.language_model import LanguageModel
from cutaway.model.sweep.sweep import Sweep

Cell = tuple[int, int]


class PatchSweep:
    """One clean and one corrupt row; a cell patches the corrupt run with the clean value.

    "heads": cell (layer, head), its z at every position. "positions": cell (layer, position), the stream before the
    layer. `step` leaves out cells: every so many heads or positions are swept. The metric is the difference of two
    logits at the last position.
    """

    def __init__(self, lm: LanguageModel, kind: str, length: int, step: int = 1) -> None:
        self.lm, self.kind, self.length = lm, kind, length
        self.ids = torch.randint(2, lm.d_vocab, (2, length), generator=torch.Generator().manual_seed(length))
        self.answers = (11, 12)
        second = lm.n_heads if kind == "heads" else length
        self.cells: list[Cell] = [(layer, i) for layer in range(lm.n_layers) for i in range(0, second, step)]
        sites = "blocks.*.attn.z" if kind == "heads" else "blocks.*.resid_pre"
        self.clean = lm.run(self.ids[:1], capture=sites, logits=None)
        what = "heads patched at every position" if kind == "heads" else "the stream patched by layer and position"
        self.title = f"{what}, {len(self.cells)} cells" + (f" (one in {step})" if step > 1 else "")

    def groups(self, size: int) -> list[list[Cell]]:
        """The cells in shares of `size`, each spread over the layers."""
        n = len(self.cells) // size
        return [self.cells[i::n] for i in range(n)]

    def of_last(self, logits: Tensor) -> Tensor:
        """Logits of the last position [b, V] -> [b]."""
        return logits[:, self.answers[0]] - logits[:, self.answers[1]]

    def metric(self, logits: Tensor) -> Tensor:
        """[b, p, V] -> [b], at the last position."""
        return self.of_last(logits[:, -1])

    def baseline(self) -> Tensor:
        with torch.no_grad():
            return self.metric(self.lm.hf(input_ids=self.ids[1:], use_cache=False).logits)[0]

    def one_by_one(self, cells: Sequence[Cell]) -> Tensor:
        """A forward a cell with a hook on the module, all logits, the clean values already at hand."""
        blocks: Any = self.lm.hf.transformer.h  # pyright: ignore[reportAttributeAccessIssue]
        found = torch.zeros(len(cells))
        width = self.lm.d_head
        for i, (layer, other) in enumerate(cells):
            if self.kind == "heads":
                module, clean = blocks[layer].attn.c_proj, self.clean[f"blocks.{layer}.attn.z"][:, :, other]
                where = (slice(None), slice(None), slice(other * width, (other + 1) * width))
            else:
                module, clean = blocks[layer], self.clean[f"blocks.{layer}.resid_pre"][:, other]
                where = (slice(None), other)

            def hook(module, args, where=where, clean=clean):
                x = args[0].clone()
                x[where] = clean
                return (x, *args[1:])

            handle = module.register_forward_pre_hook(hook)
            try:
                with torch.no_grad():
                    found[i] = self.metric(self.lm.hf(input_ids=self.ids[1:], use_cache=False).logits)[0].item()
            finally:
                handle.remove()
        return found

    def ours(self) -> Sweep:
        """The whole sweep as a user of cutaway asks for it, the clean run included."""
        site = "blocks.{}.attn.z" if self.kind == "heads" else "blocks.{}.resid_pre"
        clean = self.lm.run(self.ids[:1], capture=site.format("*"), logits=None)
        cells = [
            cutaway.patch(site.format(layer), clean, heads=i)
            if self.kind == "heads"
            else cutaway.patch(site.format(layer), clean, positions=i)
            for layer, i in self.cells
        ]
        return self.lm.sweep(self.ids[1:], cells, lambda logits, _: self.of_last(logits))
