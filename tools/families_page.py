"""How exactly each family of the test bed is read: the numbers of docs/parity.md.

    python tools/families_page.py [FAMILY ...]

prints one line a family; `make docs` writes the page, and the tests measure every number again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))  # the test bed is the tests'

if TYPE_CHECKING:
    pass

DTYPES = ("float32", "bfloat16", "float16")
DLA_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """One family: untouched logits bit-equal in every dtype, the worst residual of the self-test by dtype and how many
    checks it made, and by how much the parts of direct logit attribution miss their sum (fp32).
    """

    family: str
    model_class: str
    bit_equal: bool
    residuals: dict[str, float]
    checks: int
    dla: float

    @property
    def passed(self) -> bool:
        from cutaway.model.selftest.result import TOLERANCE

        allowed = {str(dtype).removeprefix("torch."): value for dtype, value in TOLERANCE.items()}
        exact = all(residual <= allowed[dtype] for dtype, residual in self.residuals.items())
        return self.bit_equal and exact and self.dla <= DLA_TOLERANCE

    @property
    def row(self) -> tuple[str, ...]:
        return (
            self.family,
            self.model_class,
            "yes" if self.bit_equal else "NO",
            *(f"{self.residuals[dtype]:.0e}" for dtype in DTYPES),
            str(self.checks),
            f"{self.dla:.0e}",
        )


def measure(family: str) -> Parity:
    """Make the family's small model, in each dtype, and measure."""
    import torch
    from bed import bed_model

    from cutaway.model.language_model import attach
    from cutaway.observe.attribution.parts import dla_sum_errors

    residuals, equal, checks, dla, model_class = {}, True, 0, float("nan"), ""
    for name in DTYPES:
        dtype: torch.dtype = getattr(torch, name)
        lm = attach(bed_model(family).to(dtype=dtype), name=family)  # type: ignore[call-arg]
        tokens = lm.tokens([[5, 9, 17, 33, 4, 60], [90, 3, 44]])
        with torch.no_grad():
            plain = lm.hf(
                input_ids=tokens.ids,
                attention_mask=tokens.mask.long(),
                position_ids=tokens.position_ids,
                use_cache=False,
            ).logits
        logits = lm.run(tokens).logits
        equal = equal and logits is not None and torch.equal(plain, logits)
        test = lm.selftest()
        residuals[name] = max(row.residual for row in test.checks)
        if dtype == torch.float32:
            checks, dla, model_class = len(test.checks), max(dla_sum_errors(lm).values()), type(lm.hf).__name__
    return Parity(family, model_class, equal, residuals, checks, dla)


def families() -> list[str]:
    from bed import BED

    return list(BED)


COLUMNS = ("family", "class", "logits bit-equal", "residual fp32", "bf16", "fp16", "checks", "DLA sum error")


def page() -> str:
    """docs/parity.md."""
    from cutaway.model.selftest.result import TOLERANCE

    allowed = {str(dtype).removeprefix("torch."): f"{value:.0e}" for dtype, value in TOLERANCE.items()}
    found = [measure(family) for family in families()]
    failed = [one.family for one in found if not one.passed]
    types = len({one.model_class for one in found})
    head = [
        "# Families, and how exactly each is read",
        "",
        f"{len(found)} small random models of {types} classes of transformers, with random gains and biases.",
        "`make docs` measures this page; the tests measure it again and fail beyond the tolerances.",
        "",
        "- *logits bit-equal*: `lm.run(ids)` returns the bits of the plain model's call, in fp32, bf16 and fp16, with",
        "  a padded row.",
        "- *residual*: the worst of all checks of `lm.selftest()`, relative to the scale of the values compared.",
        f"  Allowed: fp32 {allowed['float32']}, bf16 {allowed['bfloat16']}, fp16 {allowed['float16']}.",
        "- *DLA sum error*: by how much the parts of a direct logit attribution miss the logit difference before a",
        f"  softcap, relative to the largest part, in fp32. Allowed: {DLA_TOLERANCE:.0e}.",
        "",
        "A model of another type has to pass its self-test when it is attached, or is refused.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(one.row) + " |" for one in found),
        "",
        "All within tolerance." if not failed else f"BEYOND TOLERANCE: {', '.join(failed)}.",
        "",
        "Refused: attention that gates or normalises what its heads write (BitNet, AFMoE, DiffLlama), state spaces and",
        "linear attention (Mamba, RWKV, hybrids), norms in the stream itself (OPT 350m), encoders and",
        "encoder-decoders.",
    ]
    return "\n".join(head)


if __name__ == "__main__":
    for name in sys.argv[1:] or families():
        result = measure(name)
        print("  ".join(result.row), "" if result.passed else "BEYOND TOLERANCE", flush=True)
