"""One latent of a dictionary as a small view."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.harvesting.activations import counted
from cutaway.model.language_model import LanguageModel

_BATCH_ROWS = 16
_BEFORE, _AFTER = 12, 6


class _Weights(Protocol):
    """What the view needs of its dictionary."""

    @property
    def W_enc(self) -> Tensor: ...
    @property
    def b_enc(self) -> Tensor: ...
    @property
    def W_dec(self) -> Tensor: ...
    @property
    def site(self) -> str: ...
    @property
    def sparsity(self) -> Tensor | None: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    def activations_of(self, x: Tensor, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False, repr=False)
class Latent:
    """A latent: where it reads and what it writes. `dictionary.latent(7)` makes it."""

    dictionary: _Weights
    """The dictionary that it is of."""
    index: int
    """Its number."""

    @property
    def site(self) -> str:
        """What the dictionary reads."""
        return self.dictionary.site

    @property
    def encoder(self) -> Tensor:
        """The direction that it reads [d_in], a column of W_enc."""
        return self.dictionary.W_enc[:, self.index]

    @property
    def decoder(self) -> Tensor:
        """The direction that it writes [d_out], a row of W_dec."""
        return self.dictionary.W_dec[self.index]

    @property
    def bias(self) -> float:
        """The encoder's bias."""
        return float(self.dictionary.b_enc[self.index])

    @property
    def norm(self) -> float:
        """Length of the decoder row."""
        return float(self.decoder.float().norm())

    @property
    def frequency(self) -> float | None:
        """The share of tokens on which it is active, where the dictionary says so."""
        sparsity = self.dictionary.sparsity
        return None if sparsity is None else float(10 ** sparsity[self.index])

    def activations(self, x: Tensor) -> Tensor:
        """Its activations, selection included: [..., d_in] -> [...].

        Args:
            x: Activations that the dictionary reads [..., d_in].
        """
        return self.dictionary.activations_of(x, torch.tensor([self.index]))[..., 0]

    def cosines(self) -> Tensor:
        """Signed cosines of its decoder row with every latent's, itself included: float32 [F]."""
        rows = torch.nn.functional.normalize(self.dictionary.W_dec.detach().float(), dim=1)
        return rows @ rows[self.index]

    def nearest(self, k: int = 5) -> tuple[tuple[int, float], ...]:
        """The k other latents with the nearest decoder rows.

        Args:
            k: How many.

        Returns:
            (latent, signed cosine) by falling cosine.
        """
        cosines = self.cosines()
        cosines[self.index] = -torch.inf
        top = cosines.topk(min(k, len(cosines) - 1))
        return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def top_tokens(self, lm: LanguageModel, k: int = 8) -> tuple[tuple[str, float], ...]:
        """The tokens whose logit its decoder row raises by the largest amounts, on the direct path.

        Args:
            lm: The model that the dictionary belongs to.
            k: How many tokens.

        Returns:
            (token, change of its logit per unit of activation against the mean over the vocabulary).
        """
        logits = direct_logits(lm, self.decoder[None])[0]
        top = logits.topk(k)
        return tuple(zip(lm.token_strings(top.indices.tolist()), top.values.tolist(), strict=True))

    @torch.no_grad()
    def top_examples(
        self, lm: LanguageModel, rows: Tensor | Sequence[Sequence[int]], n: int = 5
    ) -> tuple[tuple[float, str], ...]:
        """Where it is strongest in some rows. `cutaway.features.top_examples` does the same for all latents at once.

        Args:
            lm: The model that the dictionary belongs to.
            rows: Token ids [n, p], or lists of ids of any length.
            n: Examples, each of another row.

        Returns:
            (activation, text around it with the token in double brackets), by falling activation.

        Raises:
            CutawayError: the dictionary reads several sites.
        """
        found: list[tuple[float, str]] = []
        for start in range(0, len(rows), _BATCH_ROWS):
            tokens = lm.tokens([list(map(int, row)) for row in rows[start : start + _BATCH_ROWS]])
            value = lm.run(tokens, capture=self.site, logits=None)[self.site].flatten(2)
            if value.shape[-1] != self.dictionary.d_in:
                raise CutawayError("a latent of a crosscoder reads several sites: look at it with `judge` instead")
            keep = (tokens.mask & counted(tokens.ids, lm.bos_id)).to(value.device)
            best, columns = self.activations(value).masked_fill(~keep, 0).max(1)
            for row in (best > 0).nonzero().flatten().tolist():
                strings, at = tokens.strings[row], int(columns[row])
                before, after = strings[max(0, at - _BEFORE) : at], strings[at + 1 : at + 1 + _AFTER]
                found.append((float(best[row]), f"{''.join(before)}[[{strings[at]}]]{''.join(after)}"))
        return tuple(sorted(found, key=lambda one: -one[0])[:n])

    def __repr__(self) -> str:
        often = "" if self.frequency is None else f", active on {self.frequency:.3%} of tokens"
        near = ", ".join(f"{latent} ({cosine:.2f})" for latent, cosine in self.nearest(3))
        return (
            f"latent {self.index} of {self.dictionary.d_sae:,} at {self.site}: bias {self.bias:.3g}, decoder norm "
            f"{self.norm:.3g}{often}\n  nearest by decoder cosine: {near or 'none'}"
        )


def direct_logits(lm: LanguageModel, directions: Tensor) -> Tensor:
    """How every logit changes per unit of a direction in the last residual stream.

    With its divisor fixed (here at 1) the final norm is linear: it subtracts the mean (LayerNorm only) and multiplies
    by the gain. A final softcap is left out.

    Args:
        lm: The model.
        directions: Directions of the residual stream [n, d_model].

    Returns:
        Changes [n, d_vocab], centred over the vocabulary.
    """
    norm = lm.family.ln_final
    d = directions.detach().to(lm.device, torch.float32)
    d = d if norm is None else norm.linear(d)
    logits = d @ lm.output_directions(torch.arange(lm.d_vocab, device=lm.device)).float().T
    return logits - logits.mean(-1, keepdim=True)
