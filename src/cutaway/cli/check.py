"""`cutaway check`: is this model what the library takes it for?"""

from typing import Any

from cutaway.cli.options import Flag
from cutaway.cli.output import print_json


def check(
    model: str,
    /,
    *,
    dtype: str | None = None,
    device: str | None = None,
    json: Flag = False,
) -> int:
    """Load a model, print its card, and test on every layer that its parts add up. Exit code 1 if one does not.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    dtype
        float32, bfloat16 or float16; float32 on a CPU and the checkpoint's own on a GPU if not given.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print the card and the table as JSON on stdout, and nothing else.
    """
    import cutaway

    lm = cutaway.load(model, dtype=dtype, device=device)
    test = lm.selftest()
    facts = card(lm)
    if json:
        rows = [
            {
                "check": row.check,
                "layer": row.layer,
                "residual": row.residual,
                "tolerance": row.tolerance,
                "ok": row.ok,
            }
            for row in test.rows
        ]
        print_json({"card": facts, "passed": test.passed, "rows": rows})
    else:
        width = max(map(len, facts))
        for label, value in facts.items():
            print(f"{label:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")
        print()
        print(test)
    return 0 if test.passed else 1


def card(lm: Any) -> dict[str, str | int]:
    """What a `LanguageModel` is, label by label."""
    identity = lm.identity()
    return {
        "model": lm.name,
        "revision": identity.revision or "none",
        "weights": f"sha256 {identity.weight_hash}",
        "architecture": type(lm.hf).__name__,
        "parameters": lm.n_parameters,
        "layers": lm.n_layers,
        "d_model": lm.d_model,
        "heads": lm.n_heads,
        "key-value heads": lm.n_kv_heads,
        "d_head": lm.d_head,
        "d_mlp": lm.d_mlp,
        "vocabulary": lm.d_vocab,
        "context": lm.context_length,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
    }
