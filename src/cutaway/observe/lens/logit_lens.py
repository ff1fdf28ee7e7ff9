"""Logit lens: what would the model say if it stopped after this layer? (nostalgebraist 2020)

Each layer's residual stream goes through the model's own final norm and unembedding, with the stream's own statistics.
The last layer is the model's output exactly. A token that is readable early is not thereby *used* early: the lens
looks, it does not intervene. With a tuned lens (`tuned_lens.py`) each layer goes through its affine translator first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.draw.page import sections_html
from cutaway.draw.result import Result
from cutaway.draw.text import shorten
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.naming import continued, single_token
from cutaway.model.tokens import Tokens, named_token, next_tokens
from cutaway.observe.lens.view import lens_sections
from cutaway.observe.summaries import block, spread

_CHUNK_BYTES = 1 << 24
"""Size of one fp32 table of [tokens, vocabulary]; about ten exist at a time."""


class Translator(Protocol):
    """What a tuned lens does; `TunedLens` has it."""

    def check(self, lm: LanguageModel) -> None: ...
    def translate(self, site: str, stream: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """The lens at S sites and n positions of each of b prompts. `print` writes the table, `repr` a summary of it.

    By default there are S = L + 1 sites: "embed", which is what layer 0 receives, and each layer's resid_post.
    Columns of padding, and the last token's target when targets are the next tokens, are NaN (rank -1).
    """

    title: ClassVar[str] = "Logit lens"

    model: str
    """The model's name."""
    name: str
    """"logit lens", or "tuned lens" where the stream went through translators."""
    layers: tuple[str, ...]
    """The S sites."""
    tokens: Tokens
    """The prompts."""
    columns: Tensor
    """The positions' columns in `tokens` [b, n]: all of them unless `positions` chose some."""
    top_ids: Tensor
    """The k most probable tokens [S, b, n, k]."""
    top_probability: Tensor
    """Their probabilities [S, b, n, k]."""
    target_ids: Tensor
    """The target at each position [b, n], -1 where there is none."""
    target_probability: Tensor
    """The target's probability [S, b, n]."""
    target_rank: Tensor
    """The target's rank [S, b, n]; 0 is the most probable token."""
    entropy: Tensor
    """Entropy in nats [S, b, n]."""
    kl: Tensor
    """KL(final || layer) in nats [S, b, n]: how far the layer is from the model's own output."""
    followed: tuple[str, ...]
    """The f tokens that were followed."""
    followed_probability: Tensor
    """Their probabilities [S, b, n, f]."""
    followed_rank: Tensor
    """Their ranks [S, b, n, f]."""
    words: Mapping[int, str]
    """The text of each top token, by id."""

    def summary(self) -> str:
        """The last position of the first prompt, at eight sites or fewer."""
        heading, columns, *sites = self._lines(0, followed=0)
        n = len(self.tokens)
        about = f"{len(sites)} sites, {self.columns.shape[1]} positions, {n} prompt{'s' if n > 1 else ''}"
        return block([shorten(heading, 80), f"  {about}", columns, *(sites[i] for i in spread(len(sites), 9))])

    def rows(self, *, prompts: int | None = None, last: bool = False) -> list[dict[str, Any]]:
        """One row per prompt, site and position: top token, entropy, KL, target, and the tokens followed.

        Args:
            prompts: only the first so many prompts; all if None.
            last: only the last position that was read of each prompt.
        """
        found = []
        for row in range(len(self.tokens) if prompts is None else prompts):
            for i, layer in enumerate(self.layers):
                for place in self._real(row)[-1 if last else 0 :]:
                    position = int(self.columns[row, place]) - int(self.tokens.first[row])
                    at, target = (i, row, place), int(self.target_ids[row, place])
                    cells = {
                        "prompt": row,
                        "site": layer,
                        "position": position,
                        "token": self.tokens.strings[row][position],
                        "top_token": self.words[int(self.top_ids[at][0])],
                        "top_probability": float(self.top_probability[at][0]),
                        "entropy": float(self.entropy[at]),
                        "kl": float(self.kl[at]),
                        "target_id": None if target < 0 else target,
                        "target_probability": None if target < 0 else float(self.target_probability[at]),
                        "target_rank": None if target < 0 else int(self.target_rank[at]),
                    }
                    for f, word in enumerate(self.followed):
                        cells[f"probability of {word!r}"] = float(self.followed_probability[at][f])
                        cells[f"rank of {word!r}"] = int(self.followed_rank[at][f])
                    found.append(cells)
        return found

    def drawing(self) -> Markup:
        """The first prompt: top tokens by layer and position, curves over the layers, distance to the answer."""
        return sections_html(lens_sections(self.to_json()))

    def at_last(self, values: Tensor) -> Tensor:
        """Values at each prompt's last real token.

        Args:
            values: one of the tensors of this lens [S, b, n, ...].

        Returns:
            [S, b, ...].

        Raises:
            CutawayError: the lens was not read at each prompt's last token.
        """
        last = self.columns == self.tokens.last.cpu()[:, None]
        if not bool(last.any(1).all()):
            raise CutawayError("This lens was not read at each row's last token; leave positions out, or name -1.")
        return values[:, torch.arange(values.shape[1]), last.int().argmax(1)]

    def _real(self, row: int) -> list[int]:
        """Which of a row's n places are real tokens."""
        return self.tokens.mask[row].cpu()[self.columns[row]].nonzero()[:, 0].tolist()

    def _whole(self) -> Any:
        n = len(self.tokens)
        return self.to_json() if n == 1 else {"prompts": [self.to_json(row) for row in range(n)]}

    def to_json(self, row: int = 0) -> dict[str, Any]:
        """One prompt as plain data; positions are its real tokens, or those that were chosen.

        Args:
            row: number of the prompt.
        """
        places = self._real(row)
        positions = [int(self.columns[row, place]) - int(self.tokens.first[row]) for place in places]
        words = self.tokens.strings[row]
        top = [[[self.words[i] for i in place] for place in layer] for layer in self.top_ids[:, row, places].tolist()]
        return {
            "model": self.model,
            "lens": self.name,
            "layers": list(self.layers),
            "prompt": "".join(words),
            "positions": positions,
            "tokens": [words[position] for position in positions],
            "top": [[words[0] for words in layer] for layer in top],
            "probability": self.top_probability[:, row, places, 0].tolist(),
            "top_words": top,
            "top_ids": self.top_ids[:, row, places].tolist(),
            "top_probability": self.top_probability[:, row, places].tolist(),
            "target_ids": self.target_ids[row, places].tolist(),
            "target_probability": self.target_probability[:, row, places].tolist(),
            "target_rank": self.target_rank[:, row, places].tolist(),
            "entropy": self.entropy[:, row, places].tolist(),
            "kl": self.kl[:, row, places].tolist(),
            "followed": [
                {
                    "token": word,
                    "probability": self.followed_probability[:, row, places, f].tolist(),
                    "rank": self.followed_rank[:, row, places, f].tolist(),
                }
                for f, word in enumerate(self.followed)
            ],
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, row: int = 0) -> str:
        """A prompt's last position, one line per site: top token, entropy, KL, the target, and the tokens followed.

        Args:
            row: number of the prompt.
        """
        return "\n".join(self._lines(row, len(self.followed)))

    def _lines(self, row: int, followed: int) -> list[str]:
        """The table of a prompt, with so many of the tokens followed."""
        place = self._real(row)[-1]
        position = int(self.columns[row, place]) - int(self.tokens.first[row])
        words = self.tokens.strings[row]
        where = "the last token" if position == len(words) - 1 else f"position {position} ({words[position]!r})"
        lines = [f"{self.name} of {self.model} at {where} of {''.join(words)!r}"]
        extra = "".join(f"{word!r:>16}{'rank':>6}" for word in self.followed[:followed])
        known = int(self.target_ids[row, place]) >= 0
        head = f"{'p(target)':>11}{'rank':>6}" if known else ""
        lines.append(f"  {'':<22}{'top token':<16}{'p':>6}{'entropy':>9}{'KL':>8}{head}{extra}")
        for i, layer in enumerate(self.layers):
            top = self.words[int(self.top_ids[i, row, place, 0])]
            line = (
                f"  {layer:<22}{top!r:<16}{self.top_probability[i, row, place, 0]:>6.2f}"
                f"{self.entropy[i, row, place]:>9.2f}{self.kl[i, row, place]:>8.2f}"
            )
            if known:
                line += f"{self.target_probability[i, row, place]:>11.3f}{int(self.target_rank[i, row, place]):>6}"
            for f in range(followed):
                chance = float(self.followed_probability[i, row, place, f])
                line += f"{chance:>16.4f}{int(self.followed_rank[i, row, place, f]):>6}"
            lines.append(line)
        return lines


def logit_lens(
    lm: LanguageModel,
    inputs: Inputs,
    k: int = 5,
    targets: Sequence[str | int] | str | int | None = None,
    *,
    positions: int | Sequence[int] | None = None,
    sites: str | Sequence[str] | None = None,
    follow: Sequence[str | int] = (),
    tuned: Translator | None = None,
    edits: Edit | Sequence[Edit] = (),
    bos: bool | None = None,
) -> LogitLens:
    """Read the residual stream of every layer through the final norm and the unembedding (nostalgebraist 2020).

    Tables of [some tokens, vocabulary] are held for one layer at a time, beside the model's own logits.

    Args:
        lm: the model.
        inputs: one prompt or b of them: text, ids, or Tokens.
        k: how many of the most probable tokens to keep at each place.
        targets: one token per prompt (an id, or a text whose first token is meant), followed at every position; by
            default each position's target is the token that really comes next.
        positions: token positions of each prompt to read (0 is its first real token, -1 its last); all by default.
        sites: other sites to read in the same way, of the model's width, such as "blocks.*.resid_mid"; what a module
            adds ("blocks.*.mlp.out") is read on its own, with its own statistics.
        follow: tokens whose probability and rank are wanted at every layer and position, besides the target.
        tuned: a tuned lens, whose translators the stream goes through first.
        edits: edits that are in force during the run.
        bos: whether a beginning-of-text token stands before each text; the tokenizer's own habit if None.

    Returns:
        The lens at S sites, b prompts and n positions. The last layer is the model's own output, bit for bit.

    Raises:
        NoSuchSite: a site that the model has not.
        CutawayError: targets and prompts differ in number, a target text has no token, a position is outside a prompt,
            a site of another width, a tuned lens of another model, logits that are NaN.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> lens = logit_lens(lm, "The capital of the state containing Dallas is", targets=" Austin")
        >>> lens.at_last(lens.target_rank).shape  # layers and the final one, targets
        torch.Size([9, 1])
    """
    if k < 1:
        raise CutawayError(f"k={k}: the lens shows at least one top token.")
    tokens = lm.tokens(inputs, bos=bos)
    if tuned is not None:
        tuned.check(lm)
    names = _sites(lm, sites)
    columns = _columns(tokens, positions)
    target_ids = _target_ids(lm, tokens, targets).gather(1, columns)
    followed = [first_token(lm, token) for token in follow]
    last_only = bool((columns == tokens.last.cpu()[:, None]).all())
    run = lm.run(tokens, capture=names, edits=edits, logits="last" if last_only else "all")

    rows, places = tokens.mask.cpu().gather(1, columns).nonzero(as_tuple=True)
    cells = columns[rows, places]
    final_site = f"blocks.{lm.n_layers - 1}.resid_post"
    k = min(k, lm.d_vocab)
    step = max(1, _CHUNK_BYTES // (4 * lm.d_vocab))
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in names]
    for start in range(0, len(rows), step):
        row, cell = rows[start : start + step], cells[start : start + step]
        target = target_ids[row, places[start : start + step]]
        logits = run.last_logits[row] if last_only else run.all_logits[row, cell]
        final = logits.float().log_softmax(-1)
        if bool(final.isnan().any()):
            raise CutawayError(f"The logits of {lm.name} hold NaN here, so there is nothing to compare a layer with.")
        for i, name in enumerate(names):
            if name == final_site and tuned is None:  # the model's own output, bit for bit
                log_p = final
            else:
                stream = run[name][row, cell]
                stream = stream if tuned is None else tuned.translate(name, stream)
                log_p = final if name == final_site else lm.unembed(stream).float().log_softmax(-1)
            parts[i].append(_read(log_p, final, k, target, followed))
        del final

    shape = columns.shape

    def table(which: int, fill: float) -> Tensor:
        """One measured quantity, put back in its place: [S, b, n, ...]."""
        values = [torch.cat([part[which] for part in site]) for site in parts]
        whole = torch.full((len(names), *shape, *values[0].shape[1:]), fill, dtype=values[0].dtype)
        for i, value in enumerate(values):
            whole[i, rows, places] = value
        return whole

    nan = float("nan")
    top_ids = table(0, 0)
    shown = top_ids[:, rows, places].unique().tolist()
    unknown = (target_ids < 0)[None].expand(len(names), *shape)
    return LogitLens(
        model=lm.name,
        name="logit lens" if tuned is None else "tuned lens",
        layers=tuple("embed" if name == "blocks.0.resid_pre" else name for name in names),
        tokens=tokens,
        columns=columns,
        top_ids=top_ids,
        top_probability=table(1, nan),
        target_ids=target_ids,
        target_probability=table(2, nan).masked_fill(unknown, nan),
        target_rank=table(3, -1).masked_fill(unknown, -1),
        entropy=table(4, nan),
        kl=table(5, nan),
        followed=tuple(lm.token_strings(followed)),
        followed_probability=table(6, nan),
        followed_rank=table(7, -1),
        words=dict(zip(shown, lm.token_strings(shown), strict=True)),
    )


def stream_sites(lm: LanguageModel) -> list[str]:
    """What a lens reads by default: the stream before layer 0 and after each layer."""
    return ["blocks.0.resid_pre", *(f"blocks.{layer}.resid_post" for layer in range(lm.n_layers))]


def _read(log_p: Tensor, final: Tensor, k: int, target: Tensor, followed: Sequence[int]) -> tuple[Tensor, ...]:
    """Of log-probabilities [t, V]: top k ids and probabilities, target's probability and rank, entropy, KL from them
    to the final ones, and the followed tokens' probability and rank [t, f].
    """
    p = log_p.exp()
    top_p, top_ids = p.topk(k, dim=-1)
    of_target = log_p.gather(-1, target.to(log_p.device).clamp(min=0)[:, None])
    rank = (log_p > of_target).sum(-1)
    zero = torch.zeros((), device=p.device)
    entropy = -torch.where(p == 0, zero, p * log_p).sum(-1)
    kl = torch.where(final == -torch.inf, zero, final.exp() * (final - log_p)).sum(-1).clamp(min=0)
    of_followed = log_p[:, list(followed)]
    ranks = [(log_p > one[:, None]).sum(-1) for one in of_followed.unbind(-1)]
    followed_rank = torch.stack(ranks, -1) if ranks else rank.new_zeros((len(rank), 0))
    found = (top_ids, top_p, of_target[:, 0].exp(), rank, entropy, kl, of_followed.exp(), followed_rank)
    return tuple(value.cpu() for value in found)


def _sites(lm: LanguageModel, sites: str | Sequence[str] | None) -> list[str]:
    if sites is None:
        return stream_sites(lm)
    names = lm.sites().expand_all(sites)
    for name in names:
        if lm.sites()[name].dims != "b p d":
            raise NotSupported(f"A lens reads the stream, but '{name}' has the dimensions {lm.sites()[name].dims}.")
    return names


def _columns(tokens: Tokens, positions: int | Sequence[int] | None) -> Tensor:
    """Columns to read in each row, [b, n]; all of them, padding included, without positions."""
    if positions is None:
        return torch.arange(tokens.ids.shape[1]).expand(len(tokens), -1)
    chosen = [positions] if isinstance(positions, int) else list(positions)
    if not chosen:
        raise CutawayError("positions= is empty; leave it out to read every token.")
    return torch.tensor([[tokens.column(row, place) for place in chosen] for row in range(len(tokens))])


def _target_ids(lm: LanguageModel, tokens: Tokens, targets: Sequence[str | int] | str | int | None) -> Tensor:
    """Target token of every position [b, p], -1 where there is none."""
    ids, mask = tokens.ids.cpu(), tokens.mask.cpu()
    if targets is None:
        following = torch.full_like(ids, -1)
        behind, counts = next_tokens(ids, mask, lm.d_vocab)
        following[:, :-1] = behind.where(counts, -1)
        return following
    given = [targets] if isinstance(targets, str | int) else list(targets)
    if len(given) != len(ids):
        raise CutawayError(f"{len(given)} targets for {len(ids)} rows; give one per row")
    column = torch.tensor([first_token(lm, target) for target in given])
    return torch.where(mask, column[:, None].expand_as(ids), -1)


def first_token(lm: LanguageModel, target: str | int) -> int:
    """The id itself (a number, or "#422"), or the first token of a text, with the leading space that it has inside a
    sentence."""
    named = named_token(target) if isinstance(target, str) else target
    if isinstance(named, int):
        return single_token(lm, target, "target")
    if not named:
        raise CutawayError(f"the target {target!r} has no token")
    ids = None if lm.tokenizer is None else continued(lm, named)
    if ids is not None and len(ids) > 1:
        return ids[0]
    return single_token(lm, target, "target")
