"""What `cutaway.causal` hands on: every name is there, none hides a module, and the package alone loads no torch."""

import importlib
import pkgutil
import subprocess
import sys

import cutaway.causal


def test_every_name_is_there_and_none_hides_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(cutaway.causal.__path__)}
    assert not modules & set(cutaway.causal.__all__)
    for name in cutaway.causal.__all__:
        assert getattr(cutaway.causal, name) is not None
    assert importlib.import_module("cutaway.causal.patching.patch").patch_grid is cutaway.causal.patch_grid


def test_the_package_alone_loads_no_torch() -> None:
    code = "import sys, cutaway.causal; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
