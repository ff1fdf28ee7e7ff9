"""Count the skipped tests of a JUnit report and compare them with what `.ci/skips.toml` announces.

    python tools/skips.py REPORT test|slow

Exit code 1 when more tests are skipped for a reason than announced, or for a reason that is not announced.
"""

import os
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def reasons(report: Path) -> Counter[str]:
    """Skipped tests of a JUnit report, counted by the reason they give. A test that may fail (xfail) is not skipped."""
    skipped = ET.parse(report).iter("skipped")
    return Counter(skip.get("message", "no reason") for skip in skipped if skip.get("type") == "pytest.skip")


def compare(found: Counter[str], announced: dict[str, int]) -> tuple[list[str], list[str]]:
    """What to print, and which of it is a complaint."""
    lines, complaints = [], []
    for reason, number in announced.items():
        matching = sum(count for text, count in found.items() if reason in text)
        lines.append(f"  {matching} of at most {number}: {reason}")
        if matching > number:
            complaints.append(f"{matching} tests are skipped because of “{reason}”, {number} are announced")
    for text, count in found.items():
        if not any(reason in text for reason in announced):
            lines.append(f"  {count}, not announced: {text}")
            complaints.append(f"{count} tests are skipped without being announced: {text}")
    return lines, complaints


def has_shared() -> bool:
    """Whether the optional folder of real models is at hand (as tests/conftest.py looks for it)."""
    named = os.environ.get("CUTAWAY_SHARED")
    return ((Path(named) if named else ROOT.parent / "shared") / "models").is_dir()


def main(report: Path, suite: str) -> int:
    """Print the count and what is wrong with it; 0 when nothing is."""
    place = "with-shared" if has_shared() else "without-shared"
    announced = tomllib.loads((ROOT / ".ci" / "skips.toml").read_text())[suite][place]
    found = reasons(report)
    lines, complaints = compare(found, announced)
    print(f"{suite}: {found.total()} tests skipped ({place}; announced in .ci/skips.toml)")
    print("\n".join(lines))
    for complaint in complaints:
        print(f"FAILED: {complaint}; announce it in .ci/skips.toml, or mend it", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
