"""The environments that comparisons run in are the ones they were written for."""

import json
import re
import subprocess
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

ENVIRONMENTS = Path(__file__).resolve().parents[2] / "benchmarks" / "environments"
IMPORTS = {
    "saelens": "sae_lens, transformer_lens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "eap_ig": "transformer_lens, matplotlib",
}


@pytest.mark.parametrize("name", IMPORTS)
def test_the_pinned_versions_are_installed_and_import(peer: Callable[[str], Path], name: str) -> None:
    pinned = dict(re.findall(r"([\w.-]+)(?:\[\w+\])?==(\S+)", (ENVIRONMENTS / f"{name}.txt").read_text()))
    assert "torch" in pinned
    code = (
        f"import json, {IMPORTS[name]}; from importlib.metadata import version;"
        f"print(json.dumps({{name: version(name) for name in {list(pinned)}}}))"
    )
    done = subprocess.run([peer(name), "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    installed = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        package: installed[package]
        for package, wanted in pinned.items()
        if not fnmatch(installed[package].partition("+")[0], wanted)
    }
    assert not wrong, wrong
