"""The environment that the comparisons with SAELens run in is the one they were written for."""

import subprocess
from collections.abc import Callable
from pathlib import Path


def test_the_pinned_versions_are_installed_and_import(peer: Callable[[str], Path]) -> None:
    code = (
        "import sae_lens, transformer_lens, torch;"
        "from importlib.metadata import version;"
        "print(version('sae-lens'), version('transformer-lens'), torch.__version__.partition('+')[0])"
    )
    done = subprocess.run([peer("saelens"), "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saelens, transformer_lens, torch = done.stdout.split()[-3:]
    assert saelens.startswith("6.54.")
    assert transformer_lens.startswith("3.9.")
    assert torch == "2.13.0"
