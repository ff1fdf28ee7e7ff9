"""Where a dictionary belongs, in others' spellings and in ours.

Two spellings are in use beside ours: TransformerLens' hooks ("blocks.3.hook_resid_post"), and paths of Hugging Face
modules with what is meant of them ("model.layers.3.mlp.output").
"""

import re

from cutaway.model.aliases import ALIASES

UNKNOWN, UNKNOWN_OUTPUT = "unknown", "unknown output"

_HOOKS = {  # what we write; what we read is `ALIASES`
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn.out": "hook_attn_out",
    "attn.z": "attn.hook_z",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "mlp.in": "mlp.hook_in",
    "mlp.out": "hook_mlp_out",
    "mlp.post": "mlp.hook_post",
    "mlp.pre": "mlp.hook_pre",
    "ln1.normalized": "ln1.hook_normalized",
    "ln2.normalized": "ln2.hook_normalized",
}
_MODULE = re.compile(
    r"^(?:(?:base_)?model\.|language_model\.|transformer\.|gpt_neox\.|decoder\.)*(?:layers|h|blocks)\.(\d+)(?:\.(.+))?$"
)
_ATTENTION, _MLP = ("self_attn", "attn", "attention"), ("mlp", "feed_forward", "block_sparse_moe")
_MODULES = {
    ("", "output"): "resid_post",
    ("", "input"): "resid_pre",
    **{(name, "output"): "attn.out" for name in _ATTENTION},
    **{(name, "input"): "attn.in" for name in _ATTENTION},
    **{(f"{name}.{o}", "input"): "attn.z" for name in _ATTENTION for o in ("o_proj", "c_proj", "dense", "out_proj")},
    **{(name, "output"): "mlp.out" for name in _MLP},
    **{(name, "input"): "mlp.in" for name in _MLP},
    **{(f"{name}.{down}", "input"): "mlp.post" for name in _MLP for down in ("down_proj", "c_proj", "dense_4h_to_h")},
    ("pre_feedforward_layernorm", "output"): "mlp.in",
    ("post_feedforward_layernorm", "output"): "mlp.out",
}


def hook_name(site: str) -> str:
    """TransformerLens' spelling of a site: "blocks.3.resid_post" -> "blocks.3.hook_resid_post".

    A site that it has no name for keeps ours.
    """
    parts = site.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[2] in _HOOKS:
        return f"blocks.{parts[1]}.{_HOOKS[parts[2]]}"
    return {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}.get(site, site)


def site_name(hook: str, *, of_module: str = "output") -> str:
    """Our name of a TransformerLens hook or of a Hugging Face module, the inverse of `hook_name`.

    `of_module` says what is meant of a module that is named without ".input" or ".output". A spelling that is in
    neither vocabulary is returned as it is.
    """
    parts = hook.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit():
        sites = ALIASES.get(f"blocks.{{l}}.{parts[2]}")
        if sites is not None:
            return sites[0].replace("{l}", parts[1])
    if hook in ALIASES:
        return ALIASES[hook][0]
    found = _MODULE.match(hook)
    if found is not None:
        layer, rest = found.group(1), found.group(2) or ""
        for end in ("input", "output"):
            if rest == end or rest.endswith(f".{end}"):
                rest, of_module = rest[: -len(end)].rstrip("."), end
        site = _MODULES.get((rest, of_module))
        if site is not None:
            return f"blocks.{layer}.{site}"
    return hook


def module_name(site: str) -> str:
    """The module of a Llama-like Hugging Face model whose output (or input) a site is: "layers.3.mlp".

    Sites that are no module's input or output keep our name.
    """
    parts = site.split(".", 2)
    modules = {"resid_post": "", "attn.out": ".self_attn", "mlp.out": ".mlp", "mlp.in": ".mlp"}
    if len(parts) == 3 and parts[0] == "blocks" and parts[2] in modules:
        return f"layers.{parts[1]}{modules[parts[2]]}"
    return site
