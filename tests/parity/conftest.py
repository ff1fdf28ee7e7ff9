"""Peers live in environments of their own (`make parity` builds them); a test talks to them through their Python."""

from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test beside this file compares with a peer, so `-m parity` selects it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.parity)


@pytest.fixture(scope="session")
def peer() -> Callable[[str], Path]:
    """`peer("saelens")` is the Python of that peer's environment; the test skips where it has not been built.

    subprocess.run([peer("saelens"), "-c", "import sae_lens; ..."], check=True)
    """

    def python(name: str) -> Path:
        requirements = ROOT / "benchmarks" / "environments" / f"{name}.txt"
        built_from = ROOT / ".venvs" / name / "requirements.txt"
        if not built_from.is_file() or built_from.read_text() != requirements.read_text():
            pytest.skip(f"the peer's environment is not built: {name} (make parity)")
        return ROOT / ".venvs" / name / "bin" / "python"

    return python
