"""QK and OV circuits: what a head's weights alone say it looks for, and what it writes when it finds it.

A head's two circuits are products of rank at most d_head (Elhage et al. 2021): with the stream as row vectors, the
score of a destination x and a source y is x W_Q W_K^T y^T, and what a source adds to the stream is y W_V W_O. They are
kept as factors: norms, singular values, eigenvalues and products with other circuits come from [d_head, d_head]
matrices, and no [d, d] or [V, V] matrix is formed.

With `norms=True` the linear part of the norms is folded in as it is read (gains, and centring where the norm centres):
ln1 before the head, the norm after attention where there is one. The norms' divisors, biases, the positions that rotary
or ALiBi put into attention, and the attention's scale are not in a circuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NoSuchSite, NotSupported
from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.wrapped import embedding_rows
from cutaway.model.language_model import LanguageModel
from cutaway.observe.heads.circuit_results import CircuitTokens, Composition, CopyingScores, TokenPair
from cutaway.observe.heads.kinds import attention_layers
from cutaway.observe.heads.report import Head, name

Part = Literal["qk", "ov"]


@dataclass(frozen=True, eq=False)
class Factored:
    """The product left @ right [..., m, n] of rank at most r, kept as its factors.

    Everything is computed in float64 from the factors. Leading dimensions broadcast.
    """

    left: Tensor
    """[..., m, r]."""
    right: Tensor
    """[..., r, n]."""

    def __post_init__(self) -> None:
        if self.left.ndim < 2 or self.right.ndim < 2 or self.left.shape[-1] != self.right.shape[-2]:
            raise CutawayError(
                f"Factors [..., m, r] and [..., r, n] are needed; got {tuple(self.left.shape)} and "
                f"{tuple(self.right.shape)}."
            )

    @property
    def shape(self) -> torch.Size:
        """Of the product."""
        batch = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return torch.Size((*batch, self.left.shape[-2], self.right.shape[-1]))

    @property
    def rank(self) -> int:
        """The inner dimension r: the rank is at most this."""
        return self.left.shape[-1]

    @property
    def T(self) -> Factored:
        """The transpose, factors exchanged."""
        return Factored(self.right.mT, self.left.mT)

    def __getitem__(self, index: Any) -> Factored:
        """Some of the leading dimensions."""
        batch = self.shape[:-2]
        left = self.left.expand(*batch, *self.left.shape[-2:])
        right = self.right.expand(*batch, *self.right.shape[-2:])
        return Factored(left[index], right[index])

    def __matmul__(self, other: Tensor | Factored) -> Factored:
        """The product with a matrix or another factored one, still factored (at the smaller inner dimension)."""
        if isinstance(other, Factored):
            middle = self.right.double() @ other.left.double()
            if self.rank <= other.rank:
                return Factored(self.left, middle @ other.right.double())
            return Factored(self.left.double() @ middle, other.right)
        return Factored(self.left, self.right.double() @ other.double())

    def __rmatmul__(self, other: Tensor) -> Factored:
        return Factored(other.double() @ self.left.double(), self.right)

    def product(self) -> Tensor:
        """The matrix itself [..., m, n], float64. For small ones."""
        return self.left.double() @ self.right.double()

    def core(self) -> Tensor:
        """[..., r, r] with the same singular values: the triangles of a QR of both factors, multiplied."""
        if min(self.left.shape[-2], self.right.shape[-1]) < self.rank:
            return self.product()
        left = torch.linalg.qr(self.left.double(), mode="r").R
        right = torch.linalg.qr(self.right.double().mT, mode="r").R
        return left @ right.mT

    def norm(self) -> Tensor:
        """Frobenius norm [...]."""
        return self.core().pow(2).sum((-1, -2)).sqrt()

    def singular_values(self) -> Tensor:
        """The r singular values that may differ from 0, largest first [..., r]."""
        return torch.linalg.svdvals(self.core())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [..., m, r], S [..., r], Vh [..., r, n]: left @ right = U diag(S) Vh."""
        left, a = torch.linalg.qr(self.left.double())
        right, b = torch.linalg.qr(self.right.double().mT)
        u, s, vh = torch.linalg.svd(a @ b.mT, full_matrices=False)
        return left @ u, s, vh @ right.mT

    def eigenvalues(self) -> Tensor:
        """The r eigenvalues of a square product that may differ from 0 [..., r], complex: those of right @ left."""
        if self.shape[-1] != self.shape[-2]:
            raise CutawayError(f"Only a square product has eigenvalues; this one is {tuple(self.shape[-2:])}.")
        return torch.linalg.eigvals(self.right.double() @ self.left.double())

    def __repr__(self) -> str:
        return f"Factored({list(self.shape)}, rank ≤ {self.rank})"


# A model's circuits -------------------------------------------------------------------------------------------------


def _before(norm: Norm | None, weights: Tensor) -> Tensor:
    """What reads a norm's output, as reading its input up to the divisor: weights [..., d, n] -> the same."""
    return weights if norm is None else norm.pull(weights.mT).mT


def _after(norm: Norm | None, written: Tensor) -> Tensor:
    """What a norm makes of rows [..., d] up to its divisor and bias."""
    return written if norm is None else norm.linear(written)


def _check(lm: LanguageModel, layer: int) -> None:
    if not 0 <= layer < lm.n_layers:
        raise NoSuchSite(f"{lm.name} has no layer {layer}; its layers are 0 to {lm.n_layers - 1}.")
    lm.sites().resolve(f"blocks.{layer}.attn.pattern")  # raises with the reason where a layer has no heads


def _per_query_head(lm: LanguageModel, weights: Tensor) -> Tensor:
    """[KV, ...] -> [H, ...]: query head h reads key-value head h // (H / KV)."""
    return weights.repeat_interleave(lm.n_heads // len(weights), dim=0)


def output_map(lm: LanguageModel, layer: int, *, final: bool = True) -> Tensor:
    """W_O by head [H, h, d] in float64, with the gain of a norm after attention; with `final` also the linear part of
    the final norm, so that its product with an unembedding direction is a direct effect up to positive divisors.
    """
    w = _after(lm.family.layers[layer].ln1_post, lm.w_o(layer).double())
    return _after(lm.family.ln_final, w) if final else w


def qk_circuit(lm: LanguageModel, layer: int, *, norms: bool = True, raw: bool = False) -> Factored:
    """W_Q W_K^T of every head of a layer (Elhage et al. 2021). Grouped keys are repeated for their queries.

    What it leaves out: `qk_ignores`.

    Args:
        lm: the model.
        layer: number of the layer.
        norms: fold the linear part of the norm before attention in.
        raw: give the bare product also where queries and keys are normalised before they meet (QK-norm), so that it is
            not what the model compares.

    Returns:
        [H, d, d], destination first, as factors.

    Raises:
        NoSuchSite: no such layer, or one without heads.
        NotSupported: a model with QK-norm, unless `raw`.

    Example:
        >>> qk_circuit(cutaway.load("atlas"), 7)[3].singular_values().shape
        torch.Size([32])
    """
    _check(lm, layer)
    if getattr(lm.family, "qk_norm", False) and not raw:
        raise NotSupported(
            f"{lm.name} normalises queries and keys before they meet (QK-norm), so W_Q W_K^T is not what it compares; "
            "read attn.scores, or give raw=True to see the bare product."
        )
    norm = lm.family.layers[layer].ln1 if norms else None
    w_q, w_k = (_before(norm, w.double()) for w in (lm.w_q(layer), lm.w_k(layer)))
    return Factored(w_q, _per_query_head(lm, w_k).mT)


def qk_ignores(lm: LanguageModel) -> tuple[str, ...]:
    """What the QK circuit of a model leaves out, as plain words.

    Args:
        lm: the model.
    """
    ignored = ["the norm's divisor", "biases", "the scale 1/√d_head"]
    reason = next((site.absent for site in lm.sites() if site.name == "pos_embed"), None)
    if reason is not None:
        ignored.insert(0, f"positions ({reason})")
    if getattr(lm.family, "qk_norm", False):
        ignored.insert(0, "QK-norm")
    return tuple(ignored)


def ov_circuit(lm: LanguageModel, layer: int, *, norms: bool = True) -> Factored:
    """W_V W_O of every head of a layer (Elhage et al. 2021). Grouped values are repeated for their queries.

    Args:
        lm: the model.
        layer: number of the layer.
        norms: fold the linear parts of the norms before and after attention in.

    Returns:
        [H, d, d], source first, as factors.

    Raises:
        NoSuchSite: no such layer, or one without heads.
    """
    _check(lm, layer)
    w_v = _before(lm.family.layers[layer].ln1 if norms else None, lm.w_v(layer).double())
    w_o = output_map(lm, layer, final=False) if norms else lm.w_o(layer).double()
    return Factored(_per_query_head(lm, w_v), w_o)


def _embedding(lm: LanguageModel) -> Tensor:
    """The token embedding [V, d], without a scale that some families multiply it by."""
    return embedding_rows(lm.family.embed).detach()


def _unembedding_by_embedding(lm: LanguageModel, norms: bool, chunk: int = 16384) -> Tensor:
    """Σ over tokens of (direction that raises the token) x (its embedding): [d, d], float64, the final gain folded.

    With G what the final norm does to rows and U [V, d] the output directions: G U^T E, summed chunk by chunk.
    """
    embedding = _embedding(lm)
    total = torch.zeros(lm.d_model, lm.d_model, dtype=torch.float64, device=embedding.device)
    for start in range(0, min(lm.d_vocab, len(embedding)), chunk):
        ids = torch.arange(start, min(start + chunk, lm.d_vocab, len(embedding)))
        total += lm.output_directions(ids).T.double() @ embedding[ids].double()
    return _before(lm.family.ln_final, total) if norms else total


def copying_scores(lm: LanguageModel, *, norms: bool = True, draws: int = 200, seed: int = 0) -> CopyingScores:
    """How far each head raises the very tokens it reads: Σλ / Σ|λ| of W_E W_V W_O W_U (Elhage et al. 2021).

    1 when every eigenvalue is positive (copying: name movers, induction), -1 when all are negative (copy suppression).
    The [V, V] circuit has the eigenvalues of a [d_head, d_head] product and zeros, so it is never formed. It reads the
    bare embedding: a head deep in a model reads streams that other layers wrote, and this says nothing of those.

    Args:
        lm: the model.
        norms: fold the linear parts of the norms in.
        draws: how many random heads.
        seed: of the random heads.

    Returns:
        The score of every head, beside random heads.
    """
    layers, _ = attention_layers(lm)
    between = _unembedding_by_embedding(lm, norms)
    score = torch.full((lm.n_layers, lm.n_heads), torch.nan, dtype=torch.float64)
    for layer in layers:
        ov = ov_circuit(lm, layer, norms=norms)
        score[layer] = _balance((ov.right.to(between) @ between @ ov.left.to(between)).cpu())
    generator = torch.Generator().manual_seed(seed)
    between = between.cpu()
    random = torch.cat(
        [
            _balance(w_o @ between @ w_v)
            for w_o, w_v in (
                (_gaussian((1, lm.d_head, lm.d_model), generator), _gaussian((1, lm.d_model, lm.d_head), generator))
                for _ in range(draws)
            )
        ]
    )
    low, high = torch.quantile(random, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    above = (random >= score[..., None]).sum(-1)
    tail = torch.minimum(above, (random <= score[..., None]).sum(-1))
    p = torch.where(score.isnan(), torch.nan, (2 * (tail + 1) / (draws + 1)).clamp(max=1.0).double())
    return CopyingScores(lm.name, score, random.mean().item(), (low, high), draws, p)


def _balance(matrices: Tensor) -> Tensor:
    """Σλ / Σ|λ| of square matrices [..., h, h]: [...]."""
    eigenvalues = torch.linalg.eigvals(matrices)
    return eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1).clamp(min=1e-300)


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Composition --------------------------------------------------------------------------------------------------------


def composition(
    lm: LanguageModel, *, norms: bool = True, raw: bool = False, draws: int = 64, seed: int = 0
) -> Composition:
    """Q-, K- and V-composition of every head with every head of an earlier layer (Elhage et al. 2021).

    With OV₁ the writer's circuit and QK₂, OV₂ the reader's: Q is ‖OV₁ QK₂‖, K is ‖QK₂ OV₁^T‖, V is ‖OV₁ OV₂‖, each
    over the product of both norms. With QK-norm only V is measured, unless `raw=True`. It is a statement about weights:
    positions, the norms' divisors and everything the layers between them do are not in it.

    Args:
        lm: the model.
        norms: fold the linear parts of the norms in.
        raw: measure the bare weights also where queries and keys are normalised before they meet.
        draws: how many pairs of random heads.
        seed: of the random heads.

    Returns:
        The scores of every pair of heads, beside random pairs.
    """
    layers, _ = attention_layers(lm)
    left_out: dict[str, str] = {}
    if getattr(lm.family, "qk_norm", False) and not raw:
        reason = "queries and keys are normalised before they meet (QK-norm); raw=True measures the bare weights"
        left_out = {"q": reason, "k": reason}
    writers = {layer: ov_circuit(lm, layer, norms=norms) for layer in layers}
    reads: dict[str, dict[int, Factored]] = {"v": writers}
    if not left_out:
        reads["q"] = {layer: qk_circuit(lm, layer, norms=norms, raw=raw) for layer in layers}
        reads["k"] = {layer: circuit.T for layer, circuit in reads["q"].items()}
    shape = (lm.n_layers, lm.n_heads, lm.n_layers, lm.n_heads)
    scores: dict[str, Tensor] = {}
    for kind, readers in reads.items():
        scores[kind] = torch.full(shape, torch.nan, dtype=torch.float64)
        for a in layers:
            for b in layers:
                if a < b:
                    scores[kind][a, :, b, :] = composition_scores(writers[a], readers[b]).cpu()
    generator = torch.Generator().manual_seed(seed)
    d, h = lm.d_model, lm.d_head

    def random() -> Factored:
        return Factored(_gaussian((1, d, h), generator), _gaussian((1, h, d), generator))

    chance = torch.cat([composition_scores(random(), random()).flatten() for _ in range(draws)])
    low, high = torch.quantile(chance, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Composition(
        lm.name, scores.get("q"), scores.get("k"), scores["v"], chance.mean().item(), (low, high), draws, left_out
    )


def composition_scores(first: Factored, second: Factored) -> Tensor:
    """‖A B‖ / (‖A‖ ‖B‖) of every A of `first` [m, d, d] with every B of `second` [n, d, d]: [m, n].

    With A = Q_A (R_A right_A) and B = (left_B R_B^T) Q_B^T (QR), ‖A B‖ is the norm of an [r, r] product.
    """
    heads, other = first.shape[0], second.shape[0]
    r_a = torch.linalg.qr(first.left.double(), mode="r").R
    r_b = torch.linalg.qr(second.right.double().mT, mode="r").R
    a = r_a @ first.right.double()  # [m, r, d]
    b = second.left.double() @ r_b.mT  # [n, d, r]
    products = a.flatten(0, 1) @ b.transpose(0, 1).flatten(1)  # [m r, n r]
    squares = products.pow(2).reshape(heads, a.shape[1], other, b.shape[2])
    return squares.sum((1, 3)).sqrt() / (first.norm()[:, None] * second.norm()[None])


# Which tokens -------------------------------------------------------------------------------------------------------


def circuit_tokens(
    lm: LanguageModel,
    head: Head,
    part: Part,
    tokens: str | list[int] | None = None,
    *,
    k: int = 5,
    norms: bool = True,
    raw: bool = False,
    chunk: int = 1024,
) -> CircuitTokens:
    """The largest cells of a head's circuit between tokens, largest first.

    "ov": E W_V W_O U^T, "qk": E W_Q W_K^T E^T, with each embedding divided as the head's norm divides (`norms`). With
    `tokens` (a text or ids) the k largest of each of these tokens' rows, in their order; else the k largest of all.
    A value is the target's logit (its score) above the mean of all targets, up to the norms' divisors downstream and
    for bare embeddings: what other layers add is not seen. For "qk" see `qk_ignores`.

    Args:
        lm: the model.
        head: (layer, head).
        part: "ov" or "qk".
        tokens: a text or ids; the whole vocabulary if None.
        k: how many cells, of each token's row with `tokens`.
        norms: fold the linear parts of the norms in.
        raw: give the bare product also of a model with QK-norm.
        chunk: how many rows of [vocabulary] are held at a time.

    Returns:
        The cells.

    Raises:
        NoSuchSite: no such head.
        NotSupported: a model with QK-norm, unless `raw`.
        CutawayError: an unknown part.
    """
    layer, index = head
    if not 0 <= index < lm.n_heads:
        raise NoSuchSite(f"{lm.name} has no head {name(head)}; it has {lm.n_layers} × {lm.n_heads}.")
    if part == "ov":
        circuit = ov_circuit(lm, layer, norms=norms)[index]
    elif part == "qk":
        circuit = qk_circuit(lm, layer, norms=norms, raw=raw)[index]
    else:
        raise CutawayError(f"part={part!r} is not 'qk' or 'ov'.")
    if isinstance(tokens, str):
        given = lm.tokens(tokens, bos=False if lm.bos_id is not None else None).row_ids(0)
    else:
        given = list(range(lm.d_vocab_in)) if tokens is None else lm.tokens([tokens]).row_ids(0)
    right = circuit.right.double()
    written = _after(lm.family.ln_final, right) if norms and part == "ov" else right

    def read(ids: Sequence[int]) -> Tensor:
        return _read_embedding(lm, layer, ids) if norms else _embedding(lm)[list(ids)].double()

    def column(ids: Sequence[int]) -> Tensor:
        return written @ (read(ids) if part == "qk" else lm.output_directions(list(ids)).double()).T

    size = lm.d_vocab_in if part == "qk" else lm.d_vocab
    starts = range(0, size, chunk)
    columns = torch.cat([column(range(i, min(i + chunk, size))) for i in starts], dim=-1)  # [h, V]
    columns -= columns.mean(-1, keepdim=True)  # what all targets share moves no softmax
    best: list[tuple[float, int, int]] = []
    for start in range(0, len(given), chunk):
        ids = given[start : start + chunk]
        cells = (read(ids) @ circuit.left.double()) @ columns
        if tokens is None:
            values, flat = cells.flatten().topk(min(k, cells.numel()))
            found = [(v, ids[i // cells.shape[1]], i % cells.shape[1])
                     for v, i in zip(values.tolist(), flat.tolist(), strict=True)]  # fmt: skip
            best = sorted([*best, *found], reverse=True)[:k]
        else:
            values, targets = cells.topk(min(k, cells.shape[1]))
            best += [(v, source, target) for source, row, hits in
                     zip(ids, values.tolist(), targets.tolist(), strict=True)
                     for v, target in zip(row, hits, strict=True)]  # fmt: skip
    sources, targets = lm.token_strings([s for _, s, _ in best]), lm.token_strings([t for _, _, t in best])
    pairs = [TokenPair(s, t, v) for (v, _, _), s, t in zip(best, sources, targets, strict=True)]
    return CircuitTokens(lm.name, (layer, index), part, tuple(pairs))


def _read_embedding(lm: LanguageModel, layer: int, ids: Sequence[int]) -> Tensor:
    """Embeddings as the norm before a layer's attention divides them [n, d], float64 (gain and centring are in the
    circuit).
    """
    norm = lm.family.layers[layer].ln1
    with torch.no_grad():
        embedding = lm.hf.get_input_embeddings()(torch.tensor(list(ids), device=lm.device)).double()
    if norm is None:
        return embedding
    wide, divisor = norm.divide(embedding)
    return wide / divisor
