"""`cutaway check`: is this model what the library takes it for?"""

from typing import TYPE_CHECKING, Any

from cutaway.artifacts.command import current_command
from cutaway.cli.options import DType, Flag, ModuleFile, Page, announce, opened
from cutaway.cli.output import deliver

if TYPE_CHECKING:
    from cutaway.model.selftest.result import SelfTest


def check(
    model: str | None = None,
    /,
    *,
    module: ModuleFile = None,
    dtype: DType = None,
    device: str | None = None,
    json: Flag = False,
    html: Page = None,
) -> int:
    """Load a model, print its card, and test on every layer that its parts add up. Exit code 1 if one does not.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print the card and the table as JSON on stdout, and nothing else.
    html
        Write a page: the card, each check's worst layer, and the residuals layer by layer.
    """
    announce(model, module)
    lm = opened(model, module, dtype=dtype, device=device)
    test = lm.selftest()
    facts = card(lm)
    width = max(map(len, facts))
    lines = [f"{label:<{width}}  {f'{value:,}' if isinstance(value, int) else value}" for label, value in facts.items()]
    deliver(
        text="\n".join([*lines, "", str(test)]),
        model=lm.name,
        figures={"card": facts, **test.to_json()},
        page=lambda: _page(test, facts),
        as_json=json,
        html=html,
    )
    return 0 if test.passed else 1


def _page(test: "SelfTest", facts: dict[str, str | int]) -> str:
    """The card, one line per check, and how far each check is from its tolerance in every layer."""
    from cutaway.draw.page import page_html
    from cutaway.draw.panels import table_html

    return page_html(
        title=f"Self-test of {test.model}: {test.verdict}",
        lead=f"{facts['architecture']} in {test.dtype}. Identities between the values at different sites, and the "
        "effect of an edit at every site of every layer, each relative to the scale of the values compared."
        + "".join(f" {note}" for note in test.notes),
        sections=[
            ("The model", "", table_html(columns=["", ""], rows=[[k, v] for k, v in facts.items()], title="Card")),
            ("Every check", "The layer with the largest residual.", test.table()),
            (
                "By layer",
                "By its number in the table above, how many digits each residual lies within its tolerance: 0 is at "
                "the limit, below 0 the check fails, 4 or more is rounding or exact.",
                test.by_layer(),
            ),
        ],
        command=current_command(),
    )


def card(lm: Any) -> dict[str, str | int]:
    """What a `LanguageModel` is, label by label."""
    identity = lm.identity()
    return {
        "model": lm.name,
        **({} if identity.id == lm.name else {"loaded from": identity.id}),
        "revision": identity.revision or "none",
        "weights": f"sha256 {identity.weight_hash}",
        "architecture": lm.architecture,
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
        **({} if lm.causal else {"attention": "not causal: tokens see later ones"}),
    }
