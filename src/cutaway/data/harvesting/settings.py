"""What a harvest keeps, and how it is stored."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.rows import RowBatch


@dataclass(frozen=True)
class Rules:
    """Which tokens are kept. Padding never is.

    Models park attention on the first token of a row and on the beginning of a text; the vectors there are often a
    hundred times longer than any other.
    """

    bos: Literal["drop", "keep"] = "drop"
    """The beginning-of-text token wherever it stands, between packed documents too."""
    first_position: Literal["drop", "keep"] = "drop"
    """A row's first token."""
    high_norm: float | None = None
    """Leave out a token whose vector is longer than so many times the site's median, at any of the sites. The median is
    that of the first 4,096 tokens of the corpus that the other rules keep. None keeps all."""

    def __post_init__(self) -> None:
        for name in ("bos", "first_position"):
            if getattr(self, name) not in ("drop", "keep"):
                raise CutawayError(f"the rule {name} is '{getattr(self, name)}'; it is 'drop' or 'keep'")
        if self.high_norm is not None and not self.high_norm > 1:
            raise CutawayError(
                f"high_norm is {self.high_norm}, a multiple of the median norm; give more than 1, or None"
            )

    def keep(self, batch: RowBatch, bos_id: int | None) -> tuple[Tensor, dict[str, int]]:
        """What all rules but `high_norm` keep.

        Args:
            batch: Rows as the model reads them.
            bos_id: The beginning-of-text token, if there is one.

        Returns:
            bool [b, p], and how many tokens each rule left out, the first that did.
        """
        keep = batch.mask.clone()
        counts = {"read": int(keep.sum()), "padding": int((~keep).sum()), "first_position": 0, "bos": 0}
        first = torch.zeros_like(keep)
        first[:, 0] = True
        for name, drops in (("first_position", first), ("bos", batch.ids == (-1 if bos_id is None else bos_id))):
            if getattr(self, name) == "drop":
                counts[name] = int((keep & drops).sum())
                keep &= ~drops
        return keep, counts


@dataclass(frozen=True)
class Storage:
    """How activations are stored."""

    dtype: str | None = None
    """float32, float16 or bfloat16; the model's own if None."""
    heads: Literal["keep", "flatten"] = "keep"
    """A site by head as [H, h], or flattened to one vector [H · h]."""
    shard_tokens: int | None = None
    """Tokens per shard; as many as fill about 256 MiB if None."""
    file_format: Literal["safetensors", "parquet"] = "safetensors"
    """The format of the shards."""
    verify: bool = False
    """Of a folder that is finished already, compare the hashes of all shards; else this is done up to 1 GiB, and of
    more only the sizes are looked at."""
