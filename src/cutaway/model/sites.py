"""The site contract: what each tensor inside a model is called, its dimensions, its meaning, and why one may be
absent.

Dimensions are written b (batch), p (position), d (model width), H (heads), KV (key-value heads), h (head width), q
and k (destination and source position), m (MLP width), E (experts), V (vocabulary). Names are frozen: one tensor, one
name. TransformerLens spellings resolve when looking up and are never stored.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cutaway.artifacts.errors import NoSuchSite
from cutaway.model.aliases import ALIASES, BEFORE_A_NORM


@dataclass(frozen=True)
class SiteKind:
    """A row of the contract.

    Attributes:
        name: with `{l}` where a layer's number goes, and `{e}` where an expert's does.
        dims: its dimensions, such as "b p d".
        meaning: what it is.
    """

    name: str
    dims: str
    meaning: str

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return "{l}" in self.name

    @property
    def has_heads(self) -> bool:
        """Whether a dimension counts heads."""
        return " H" in self.dims or " KV" in self.dims


def _norm_kinds(prefix: str, where: str) -> list[SiteKind]:
    return [
        SiteKind(f"{prefix}.scale", "b p 1", f"divisor of the norm {where}: sqrt(variance + eps), or the RMS"),
        SiteKind(f"{prefix}.normalized", "b p d", f"the normalized value {where}, without the gain"),
    ]


# In the order in which a forward pass reaches them (parallel models reach ln2 and the MLP from resid_pre).
_BLOCK = [
    SiteKind("blocks.{l}.resid_pre", "b p d", "the stream before the layer"),
    *_norm_kinds("blocks.{l}.ln1", "before attention"),
    SiteKind("blocks.{l}.attn.in", "b p d", "what enters attention: after norm and gain"),
    SiteKind("blocks.{l}.attn.q", "b p H h", "queries, before QK-norm and rotary"),
    SiteKind("blocks.{l}.attn.k", "b p KV h", "keys, before QK-norm and rotary; grouped"),
    SiteKind("blocks.{l}.attn.v", "b p KV h", "values; grouped"),
    SiteKind("blocks.{l}.attn.rot_q", "b p H h", "queries that attention receives"),
    SiteKind("blocks.{l}.attn.rot_k", "b p KV h", "keys that attention receives; grouped"),
    SiteKind("blocks.{l}.attn.scores", "b H q k", "after scale, softcap and mask; masked cells are -inf"),
    SiteKind("blocks.{l}.attn.pattern", "b H q k", "the softmax of the scores, before any dropout"),
    SiteKind("blocks.{l}.attn.z", "b p H h", "input of the output projection, by head"),
    SiteKind("blocks.{l}.attn.result", "b p H d", "z W_O by head, without the bias"),
    *_norm_kinds("blocks.{l}.ln1_post", "after attention"),
    SiteKind("blocks.{l}.attn.out", "b p d", "what attention adds to the stream"),
    SiteKind("blocks.{l}.resid_mid", "b p d", "the stream between attention and MLP"),
    *_norm_kinds("blocks.{l}.ln2", "before the MLP"),
    SiteKind("blocks.{l}.mlp.in", "b p d", "what enters the MLP: after norm and gain"),
    SiteKind("blocks.{l}.mlp.pre", "b p m", "input of the activation (the gate, if gated)"),
    SiteKind("blocks.{l}.mlp.pre_linear", "b p m", "the up projection of a gated MLP"),
    SiteKind("blocks.{l}.mlp.post", "b p m", "the neurons: act(pre), or act(pre) * pre_linear"),
    SiteKind("blocks.{l}.mlp.router.logits", "b p E", "a mixture of experts: the router's output"),
    SiteKind("blocks.{l}.mlp.router.weights", "b p E", "each expert's weight; zero where not chosen"),
    SiteKind("blocks.{l}.mlp.experts.{e}.out", "b p d", "what one expert writes, weighted; zero where not chosen"),
    *_norm_kinds("blocks.{l}.ln2_post", "after the MLP"),
    SiteKind("blocks.{l}.mlp.out", "b p d", "what the MLP adds to the stream"),
    SiteKind("blocks.{l}.resid_post", "b p d", "the stream after the layer"),
]
_BEFORE = [
    SiteKind("embed", "b p d", "what token embeddings add (after an embedding scale)"),
    SiteKind("pos_embed", "b p d", "what learned positions add"),
]
_AFTER = [
    *_norm_kinds("ln_final", "before the unembedding"),
    SiteKind("logits_precap", "b p V", "logits before the final softcap"),
    SiteKind("logits", "b p V", "what the model returns"),
]
KINDS: dict[str, SiteKind] = {kind.name: kind for kind in [*_BEFORE, *_BLOCK, *_AFTER]}

_LAYER = re.compile(r"^blocks\.(\d+|\*|\{\d+\.\.\d+\})\.(.+)$")
_EXPERT = re.compile(r"(?<=\.experts\.)(\d+|\*|\{\d+\.\.\d+\})(?=\.)")


@dataclass(frozen=True)
class Site:
    """One site of one model.

    Attributes:
        name: its name, such as "blocks.3.attn.z".
        kind: the row of the contract.
        layer: its layer; None for those outside the layers.
        shape: sizes of its dimensions, with the letters b, p, q, k where a run decides.
        absent: None, or the reason why this model has no such tensor.
    """

    name: str
    kind: SiteKind
    layer: int | None
    shape: tuple[str | int, ...]
    absent: str | None = None

    @property
    def dims(self) -> str:
        """Its dimensions, such as "b p d"."""
        return self.kind.dims

    @property
    def meaning(self) -> str:
        """What it is."""
        return self.kind.meaning


class SiteTable(Sequence[Site]):
    """Every site of a model, in the order of the forward pass, absent ones included with their reason."""

    def __init__(self, sites: Iterable[Site], n_layers: int) -> None:
        self._sites = tuple(sites)
        self._by_name = {site.name: site for site in self._sites}
        self._order = {site.name: i for i, site in enumerate(self._sites)}
        self._present = {site.kind.name for site in self._sites if site.absent is None}
        self.n_layers = n_layers

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, index: Any) -> Any:
        return self._by_name[self.resolve(index)] if isinstance(index, str) else self._sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def order(self, name: str) -> int:
        """The rank of a canonical name in the forward pass."""
        return self._order[name]

    def present(self) -> list[str]:
        """Names of the sites that this model has."""
        return [site.name for site in self._sites if site.absent is None]

    def resolve(self, name: str) -> str:
        """The canonical name of one site that this model has.

        Args:
            name: a name, ours or TransformerLens'.

        Raises:
            NoSuchSite: no such site, with the reason or the names that are near.
        """
        names = self.expand(name)
        if len(names) != 1:
            raise NoSuchSite(f"'{name}' names {len(names)} sites where one is needed; name a single layer.")
        return names[0]

    def expand(self, pattern: str) -> list[str]:
        """Canonical names that a name or wildcard stands for (`blocks.*.mlp.out`, `blocks.{3..7}.attn.z`).

        Args:
            pattern: a name or wildcard. A wildcard skips layers that lack the site.

        Returns:
            Names, in the order of the forward pass.

        Raises:
            NoSuchSite: a plain name that is absent, or a wildcard of which every layer lacks the site.
        """
        if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NoSuchSite(f"A site is named by text such as 'blocks.3.resid_post'; got {pattern!r}.")
        match = _LAYER.match(pattern)
        if match is None:
            return [self._require(self._meant(pattern), pattern)]
        which, rest = match.groups()
        expert = _EXPERT.search(rest)
        template = "blocks.{l}." + _EXPERT.sub("{e}", rest)
        template = self._meant(template)
        if template not in KINDS:
            raise self._unknown(pattern)
        layers = _numbers(which, self.n_layers, pattern, "layer")
        named = [template.replace("{l}", str(layer)) for layer in layers]
        names = named if expert is None else [n for one in named for n in self._experts(one, expert.group(), pattern)]
        if which == "*" or which.startswith("{"):
            present = [name for name in names if self._by_name[name].absent is None]
            if present:
                return present
        return [self._require(name, pattern) for name in names]

    def _experts(self, template: str, which: str, pattern: str) -> list[str]:
        """Names of the experts of one layer; the single absent one where it has none."""
        prefix, suffix = template.split("{e}")
        n = sum(name.startswith(prefix) and name.endswith(suffix) for name in self._by_name)
        only = f"{prefix}0{suffix}"
        if n == 1 and self._by_name[only].absent is not None:
            return [only]
        return [f"{prefix}{e}{suffix}" for e in _numbers(which, n, pattern, "expert")]

    def _meant(self, template: str) -> str:
        """Our template for a spelling of TransformerLens, which this model decides; any other as it is."""
        if BEFORE_A_NORM.get(template) in self._present:
            ours = ALIASES[template][0]
            raise NoSuchSite(
                f"'{template}' is what the module returns, before a norm; this model has no site there. What is added "
                f"to the stream, after the norm, is '{ours}'."
            )
        names = ALIASES.get(template, (template,))
        return next((name for name in names if name in self._present), names[-1])

    def expand_all(self, patterns: str | Iterable[str]) -> list[str]:
        """Canonical names of several patterns, without repeats, in the order of the forward pass."""
        patterns = [patterns] if isinstance(patterns, str) else patterns
        patterns = list(patterns) if isinstance(patterns, Iterable) else [patterns]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise NoSuchSite(f"Sites are named by text such as 'blocks.3.resid_post'; got {patterns!r}.")
        names = {name for pattern in patterns for name in self.expand(pattern)}
        return sorted(names, key=self.order)

    def _require(self, name: str, asked: str) -> str:
        site = self._by_name.get(name)
        if site is None:
            raise self._unknown(asked)
        if site.absent is not None:
            raise NoSuchSite(f"This model has no site '{asked}': {site.absent}.")
        return name

    def _unknown(self, asked: str) -> NoSuchSite:
        import difflib

        layer = re.match(r"blocks\.(\d+|\*|\{[^}]*\})\.", asked)
        expert = _EXPERT.search(asked)
        template = _EXPERT.sub("{e}", asked if layer is None else f"blocks.{{l}}.{asked[layer.end() :]}")
        known = [*KINDS, *ALIASES]
        close = difflib.get_close_matches(template, known, n=3, cutoff=0.75)
        close = close or difflib.get_close_matches(template, known, n=1, cutoff=0.6)
        names = [
            name.replace("{l}", layer.group(1) if layer else "{l}").replace("{e}", expert.group() if expert else "{e}")
            for name in close
        ]
        hint = f"; did you mean {' or '.join(map(repr, names))}?" if names else "; `lm.sites()` lists them."
        return NoSuchSite(f"There is no site '{asked}'{hint}")

    def __repr__(self) -> str:
        lines = [f"{'site':<28} {'dims':<9} {'shape':<22} meaning, or why absent"]
        shown = [s for s in self._sites if s.layer in (None, 0)]
        for site in shown:
            shape = " ".join(str(part) for part in site.shape)
            text = site.meaning if site.absent is None else f"absent: {site.absent}"
            name = site.name.replace("blocks.0.", "blocks.{l}.")
            lines.append(f"{name:<28} {site.dims:<9} {shape:<22} {text}")
        lines.append(f"(layers 0 to {self.n_layers - 1})")
        return "\n".join(lines)


def site_table(
    n_layers: int, sizes: Callable[[str, int], Mapping[str, int]], absent: Callable[[str, int], str | None]
) -> SiteTable:
    """Every site of a model, from the sizes of a site's dimensions and why it is absent, both by template and layer."""
    kinds = list(KINDS.values())
    inside = [kind for kind in kinds if kind.per_layer]
    first = kinds.index(inside[0])
    order = [(kind, None) for kind in kinds[:first]]
    order += [(kind, layer) for layer in range(n_layers) for kind in inside]
    order += [(kind, None) for kind in kinds[first + len(inside) :]]
    sites = []
    for kind, layer in order:
        name = kind.name if layer is None else kind.name.replace("{l}", str(layer))
        size = sizes(kind.name, layer or 0)
        shape = tuple(size.get(part, part) for part in kind.dims.split())
        why = absent(kind.name, layer or 0)
        experts = range(size["E"] if why is None else 1) if "{e}" in name else (0,)
        sites += [Site(name.replace("{e}", str(e)), kind, layer, shape, why) for e in experts]
    return SiteTable(sites, n_layers)


def _numbers(which: str, n: int, pattern: str, what: str) -> Sequence[int]:
    """What stands where a layer or an expert is numbered: `*`, `{3..7}` or one number below n."""
    if which == "*":
        return range(n)
    ends = which[1:-1].split("..") if which.startswith("{") else [which, which]
    if max(map(len, ends)) > 9:
        raise NoSuchSite(f"'{pattern[:40]}…' asks for a {what} of far too high a number; the last is {n - 1}.")
    low, high = int(ends[0]), int(ends[1])
    if low > high:
        raise NoSuchSite(f"'{pattern}' counts downwards; write the lower {what} first.")
    if high >= n:
        raise NoSuchSite(f"'{pattern}' asks for {what} {high}, but this model's {what}s are 0 to {n - 1}.")
    return range(low, high + 1)


def layer_of(name: str) -> int | None:
    """The layer number in a canonical site name, or None."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match and match.group(1).isdigit() else None


def template_of(name: str) -> str:
    """The contract row of a canonical site name: `blocks.3.attn.z` -> `blocks.{l}.attn.z`."""
    return _EXPERT.sub("{e}", re.sub(r"^blocks\.\d+\.", "blocks.{l}.", name))
