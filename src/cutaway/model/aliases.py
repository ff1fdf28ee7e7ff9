"""TransformerLens' spellings of our sites: the names of its `HookedTransformer`, and those of the bridge of 4.x.

They are understood wherever a site is looked up, and never stored. A spelling that means one tensor in some models and
another in others has several sites here: the first that a model has is meant.
"""

_PER_LAYER: dict[str, tuple[str, ...]] = {
    **{f"hook_{s}": (s,) for s in ("resid_pre", "resid_mid", "resid_post")},
    "hook_attn_out": ("attn.out",),
    "hook_mlp_in": ("resid_mid",),  # before the norm: never mlp.in
    "hook_mlp_out": ("mlp.out",),
    **{f"{n}.hook_{s}": (f"{n}.{s}",) for n in ("ln1", "ln2", "ln1_post", "ln2_post") for s in ("scale", "normalized")},
    **{f"attn.hook_{s}": (f"attn.{s}",) for s in ("q", "k", "v", "rot_q", "rot_k", "z", "result", "pattern")},
    "attn.hook_attn_scores": ("attn.scores",),
    **{f"mlp.hook_{s}": (f"mlp.{s}",) for s in ("pre", "pre_linear", "post")},
    # the bridge
    "hook_in": ("resid_pre",),
    "hook_out": ("resid_post",),
    "ln1.hook_in": ("resid_pre",),
    "ln1.hook_out": ("attn.in",),
    "ln1_post.hook_out": ("attn.out",),
    "ln2.hook_in": ("resid_mid", "resid_pre"),  # attention and MLP in parallel: both norms read the same stream
    "ln2.hook_out": ("mlp.in",),
    "ln2_post.hook_out": ("mlp.out",),
    "attn.hook_in": ("attn.in",),
    **{f"attn.{s}.hook_in": ("attn.in",) for s in "qkv"},
    **{f"attn.{s}.hook_out": (f"attn.{s}",) for s in "qkv"},
    "attn.o.hook_in": ("attn.z",),
    "attn.o.hook_out": ("attn.out",),
    "attn.hook_out": ("attn.out",),
    "mlp.hook_in": ("mlp.in",),
    "mlp.gate.hook_in": ("mlp.in",),
    "mlp.gate.hook_out": ("mlp.pre",),
    "mlp.in.hook_in": ("mlp.in",),
    "mlp.in.hook_out": ("mlp.pre_linear", "mlp.pre"),  # gated: the ungated half
    "mlp.out.hook_in": ("mlp.post",),
    "mlp.out.hook_out": ("mlp.out",),
    "mlp.hook_out": ("mlp.out",),
}
ALIASES: dict[str, tuple[str, ...]] = {
    "hook_embed": ("embed",),
    "embed.hook_out": ("embed",),
    "hook_pos_embed": ("pos_embed",),
    "pos_embed.hook_out": ("pos_embed",),
    **{f"blocks.{{l}}.{theirs}": tuple(f"blocks.{{l}}.{s}" for s in ours) for theirs, ours in _PER_LAYER.items()},
    "ln_final.hook_scale": ("ln_final.scale",),
    "ln_final.hook_normalized": ("ln_final.normalized",),
    "unembed.hook_out": ("logits_precap", "logits"),  # without a softcap nothing follows the unembedding
    "hook_unembed": ("logits_precap", "logits"),
}

# What a module returns is not what is added to the stream where a norm follows: spelling -> a site of that norm.
BEFORE_A_NORM = {
    f"blocks.{{l}}.{part}.{end}": f"blocks.{{l}}.{norm}.scale"
    for part, norm, ends in (
        ("attn", "ln1_post", ("hook_out", "o.hook_out")),
        ("mlp", "ln2_post", ("hook_out", "out.hook_out")),
    )
    for end in ends
}
