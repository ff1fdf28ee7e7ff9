"""Models that nobody but their author knows: plain modules of torch, each with its description."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutaway.model.own.module import Description


class Attention(nn.Module):
    """One projection for queries, keys and values, and the softmax written out."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(d, -1))
        scores = (q @ k.transpose(-1, -2)) * (d // self.heads) ** -0.5
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(d), Attention(d, heads), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """A GPT in thirty lines."""

    def __init__(self, vocabulary: int = 21, context: int = 24, d: int = 16, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.h = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x)), None


GPT = Description(
    n_heads=4, context=24, blocks="h", embed="wte", unembed="head", final_norm="ln_f", qkv="attn.qkv",
    output="attn.proj", norm1="ln_1", norm2="ln_2", mlp_in="mlp.0", mlp_out="mlp.2", scale=0.5,
)  # fmt: skip


class Bare(nn.Module):
    """One layer, no norms: attention by einsum, positions as a parameter, later tokens hidden by a large number."""

    class Block(nn.Module):
        class Attention(nn.Module):
            def __init__(self, d: int, heads: int) -> None:
                super().__init__()
                self.heads = heads
                self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q, self.k, self.v))
                scores = torch.einsum("b q h e, b k h e -> b h q k", q, k) / q.shape[-1] ** 0.5
                n = x.shape[1]
                scores = scores + torch.full((n, n), -1e5).triu(1)
                pattern = torch.softmax(scores, dim=-1)
                return self.o(torch.einsum("bhqk,bkhe->bqhe", pattern, v).flatten(-2))

        class Mlp(nn.Module):
            def __init__(self, d: int) -> None:
                super().__init__()
                self.up, self.act, self.down = nn.Linear(d, 3 * d), nn.ReLU(), nn.Linear(3 * d, d)

            def forward(self, x: Tensor) -> Tensor:
                return self.down(self.act(self.up(x)))

        def __init__(self, d: int, heads: int) -> None:
            super().__init__()
            self.attn, self.mlp = self.Attention(d, heads), self.Mlp(d)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x)
            return x + self.mlp(x)

    def __init__(self, vocabulary: int = 17, context: int = 20, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocabulary, d), nn.Parameter(torch.randn(context, d))
        self.blocks = nn.ModuleList([self.Block(d, heads)])
        self.unembed = nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.pos[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


BARE = Description(
    n_heads=3, context=20, q="attn.q", k="attn.k", v="attn.v", output="attn.o", mlp_in="mlp.up", mlp_out="mlp.down"
)


class Rms(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Unequal(nn.Module):
    """Reads 12 ids and answers with 10; rotary positions, shared keys, torch's fused attention, a gated MLP."""

    class Block(nn.Module):
        class Attention(nn.Module):
            def __init__(self, d: int, heads: int, kv: int) -> None:
                super().__init__()
                self.heads, self.kv = heads, kv
                width = d // heads
                self.query, self.out = nn.Linear(d, d), nn.Linear(d, d)
                self.key, self.value = nn.Linear(d, kv * width), nn.Linear(d, kv * width)

            def forward(self, stream: Tensor) -> Tensor:
                projections = ((self.query, self.heads), (self.key, self.kv), (self.value, self.kv))
                q, k, v = (p(stream).unflatten(-1, (n, -1)).transpose(1, 2) for p, n in projections)
                angle = torch.arange(stream.shape[1])[:, None] / 10 ** (torch.arange(q.shape[-1] // 2) / 2)
                q, k = (self.turn(t, angle.cos(), angle.sin()) for t in (q, k))
                k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
                z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
                return self.out(z.transpose(1, 2).flatten(-2))

            @staticmethod
            def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
                a, b = x.chunk(2, -1)
                return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        class Mlp(nn.Module):
            def __init__(self, d: int) -> None:
                super().__init__()
                self.gate, self.up, self.down = (nn.Linear(d, 20), nn.Linear(d, 20), nn.Linear(20, d))

            def forward(self, x: Tensor) -> Tensor:
                return self.down(F.silu(self.gate(x)) * self.up(x))

        def __init__(self, d: int, heads: int, kv: int) -> None:
            super().__init__()
            self.before_attention, self.attention = Rms(d), self.Attention(d, heads, kv)
            self.before_mlp, self.mlp = Rms(d), self.Mlp(d)

        def forward(self, stream: Tensor) -> Tensor:
            stream = stream + self.attention(stream=self.before_attention(stream))
            return stream + self.mlp(self.before_mlp(stream))

    def __init__(self, d: int = 16, heads: int = 4, kv: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.norm, self.answer = nn.Embedding(12, d), Rms(d), nn.Linear(d, 10)
        self.layers = nn.ModuleList(self.Block(d, heads, kv) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embed(ids)
        for block in self.layers:
            stream = block(stream=stream)
        return self.answer(self.norm(stream))


UNEQUAL = Description(
    n_heads=4, context=32, blocks="layers", unembed="answer", final_norm="norm", attention="attention",
    q="attention.query", k="attention.key", v="attention.value", output="attention.out", norm1="before_attention",
    norm2="before_mlp", mlp_gate="mlp.gate", mlp_in="mlp.up", mlp_out="mlp.down", scale=0.4,
)  # fmt: skip

MODELS: dict[str, tuple[type[nn.Module], Description]] = {
    "gpt": (Gpt, GPT),
    "bare": (Bare, BARE),
    "unequal": (Unequal, UNEQUAL),
}


def made(name: str, seed: int = 0, **sizes: Any) -> tuple[nn.Module, Description]:
    """A random model whose heads differ, with its description."""
    kind, description = MODELS[name]
    torch.manual_seed(seed)
    module = kind(**sizes).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    return module, description
