"""Causal tracing: which states bring a fact back once noise has hidden its subject?

Meng, Bau, Andonian & Belinkov (2022, "Locating and Editing Factual Associations in GPT"). Three runs per prompt: the
plain one; one with gaussian noise on the token embeddings of the subject; and, for each layer and token, the noised one
with one clean value put back. With P the probability of the right answer (of the model's guess where none is given),

    total effect     TE = P(plain) - P(noised)
    indirect effect  IE = P(noised, one value restored) - P(noised)

each averaged over several draws of the noise, and then over prompts (TE and AIE). States (`resid_post`) are restored
one at a time; what attention and the MLPs write is restored in windows of layers, since one layer alone moves little.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.tracing.grid import SITES, CausalTrace, window_of
from cutaway.causal.tracing.prompts import FactPrompt, answered, elsewhere_of, roles_of
from cutaway.model.edits.edits import Edit, patch
from cutaway.model.edits.edits import noise as noise_edit
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens


def default_window(n_layers: int) -> int:
    """A quarter of the layers, at most the paper's 10 (of 48)."""
    return min(10, max(1, n_layers // 4))


def causal_trace(
    lm: LanguageModel,
    facts: Sequence[FactPrompt],
    *,
    noise: float = 3.0,
    draws: int = 10,
    window: int | None = None,
    limit: int | None = None,
    batch_rows: int = 256,
    bos: bool | None = None,
    seed: int = 0,
) -> CausalTrace:
    """Trace the prompts that the model answers rightly, or that have no answer.

    Meng, Bau, Andonian & Belinkov 2022 (https://arxiv.org/abs/2202.05262). Rightly: every token of the answer is the
    model's most probable one. Without an answer the most probable token is traced: a guess, which the result calls so
    (`guessed`). All cells of a draw see the same noise.

    Args:
        lm: The model.
        facts: Prompts, each with its subject and perhaps its answer.
        noise: Standard deviation of the noise, in standard deviations of the subject tokens' embeddings over the
            prompts that are kept.
        draws: Draws of the noise per prompt.
        window: Layers in which attention and MLP outputs are restored together; None: a quarter of the layers, at most
            10.
        limit: Trace only the first so many of those prompts; None: all.
        batch_rows: Rows of a forward.
        bos: Whether prompts begin with the model's begin token; None: as the tokenizer does.
        seed: Of the noise.

    Returns:
        Average indirect effects, layer × role of the token, beside their controls.

    Raises:
        CannotDoTask: No prompt is answered rightly.
        CutawayError: A subject that its prompt lacks, or numbers out of range.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> fact = FactPrompt("The capital of the state containing Dallas is", "Dallas", " Austin")
        >>> trace = causal_trace(lm, [fact], draws=1)
        >>> trace.effects["state"].shape  # layers, tokens from the subject on, prompts
        torch.Size([8, 2, 1])
    """
    width = default_window(lm.n_layers) if window is None else window
    if not 1 <= width <= lm.n_layers:
        raise CutawayError(f"a window of {width} layers does not fit {lm.name}; give 1 to {lm.n_layers}")
    if draws < 1 or not 0 < noise < math.inf:
        raise CutawayError(f"noise of {noise:g} σ in {draws} draws hides nothing; give more than 0 of both")
    known = answered(lm, facts, bos, limit)
    n, tokens, lengths = len(known.facts), known.tokens, known.tokens.lengths.tolist()
    clean = lm.run(tokens, capture=["embed", *(f"blocks.*.{site}" for site in SITES.values())], logits="last")
    embeddings = clean["embed"].float()
    values = [
        embeddings[row, tokens.column(row, first) : tokens.column(row, last) + 1]
        for row, (first, last) in enumerate(known.spans)
    ]
    sigma = float(torch.cat(values).std(correction=0))

    def noised_run(positions: list[list[int]], first_seed: int, capture: list[str] | None) -> tuple[Run, Tensor]:
        """Every prompt under every draw of the noise, draw by draw; and the probability of its answer [n]."""
        rows = [row for row in range(n) if positions[row]]
        several = tokens[list(range(n)) * draws]
        edit = noise_edit(
            "embed",
            noise * sigma,
            rows=[draw * n + row for draw in range(draws) for row in rows],
            positions=[positions[row] for _ in range(draws) for row in rows],
            seed=[first_seed + draw for draw in range(draws) for _ in rows],
        )
        run = lm.run(several, capture=capture, edits=[edit], logits="last")
        found = probability(run.last_logits, tokens[list(range(n))])
        return run, found.view(draws, n).mean(0)

    answers = known.answers.to(lm.device)

    def probability(logits: Tensor, _tokens: Tokens) -> Tensor:
        """Probability of each prompt's answer, also of several copies of the prompts behind each other."""
        wanted = answers.repeat(len(logits) // n)
        return logits.float().softmax(-1).gather(-1, wanted[:, None])[:, 0]

    subject = [list(range(first, last + 1)) for first, last in known.spans]
    base = 1000 * seed  # draws of one seed never meet those of another
    noised, hidden = noised_run(subject, base, ["blocks.0.resid_pre", "blocks.*.resid_post"])
    _, again = noised_run(subject, base + draws, None)
    other = elsewhere_of(known.spans, lengths, seed)
    elsewhere = torch.full((n,), torch.nan)
    if any(other):
        _, found = noised_run(other, base, None)
        elsewhere = torch.where(torch.tensor([bool(o) for o in other]), found.cpu(), elsewhere)

    roles = roles_of(known.spans, lengths)
    cells = _cells(lm, clean, noised, [first for first, _ in known.spans], roles, width, draws)
    swept = lm.sweep(tokens, cells, probability, batch_rows=batch_rows, label="causal tracing")
    restored = swept.values.view(len(SITES), draws, lm.n_layers, len(roles), n).mean(1)
    effects = torch.where(roles[None, None] >= 0, restored - hidden.cpu(), torch.full_like(restored, torch.nan))
    return CausalTrace(
        model=lm.name,
        n_layers=lm.n_layers,
        facts=tuple(known.facts),
        answers=tuple(lm.token_strings(known.answers)),
        tokens=tuple(tokens.strings),
        starts=tuple(first for first, _ in known.spans),
        sigma=sigma,
        multiple=noise,
        draws=draws,
        window=width,
        seed=seed,
        clean=probability(clean.last_logits, tokens).cpu(),
        noised=hidden.cpu(),
        again=again.cpu(),
        elsewhere=elsewhere,
        effects=dict(zip(SITES, effects, strict=True)),
        roles=roles,
        refused=tuple(known.refused),
    )


def _cells(
    lm: LanguageModel, clean: Run, noised: Run, starts: Sequence[int], roles: Tensor, window: int, draws: int
) -> list[list[Edit]]:
    """One list of edits for each kind, draw, layer and place behind the subject's start, in that order.

    Each takes the noised stream over just below what it restores, from the subject on, so that the layers and the
    tokens before it need not run again; at every token where attention is not causal, for then the noise is everywhere.
    """
    n = roles.shape[1]
    lengths = clean.tokens.lengths.tolist()
    noisy = [list(range(start if lm.causal else 0, length)) for start, length in zip(starts, lengths, strict=True)]
    cells = []
    for kind, site in SITES.items():
        for draw in range(draws):
            origin = [draw * n + row for row in range(n)]
            for layer in range(lm.n_layers):
                first, last = (layer, layer) if kind == "state" else window_of(layer, window, lm.n_layers)
                if kind == "state":
                    below = f"blocks.{layer}.resid_post"
                else:
                    below = f"blocks.{first - 1}.resid_post" if first else "blocks.0.resid_pre"
                hide = patch(below, noised, positions=noisy, source_rows=origin)
                for place, of_place in enumerate(roles):
                    rows = (of_place >= 0).nonzero()[:, 0].tolist()
                    at = [[starts[row] + place] for row in rows]
                    restore = [
                        patch(f"blocks.{here}.{site}", clean, rows=rows, positions=at, source_rows=rows)
                        for here in range(first, last + 1)
                    ]
                    cells.append([hide, *restore])
    return cells
