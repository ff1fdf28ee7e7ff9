"""What no file of the repository may have: white space at line ends, no or several newlines at the end, carriage
returns, marks of an unresolved merge, or a megabyte.

    python tools/check_files.py [FILE ...]

Without names, every tracked file. Files that hold a NUL byte are taken as binary and only weighed; the shipped weights
may be heavy.
"""

import subprocess
import sys
from pathlib import Path

MAY_BE_LARGE = ("src/cutaway/subjects/atlas/weights/", "src/cutaway/subjects/atlas/dictionaries/", "models/")
LARGE = 1_000_000
CONFLICT = (b"<<<<<<< ", b">>>>>>> ")


def complaints(path: Path, name: str) -> list[str]:
    """What is wrong with one file, a line each."""
    data = path.read_bytes()
    found = []
    if len(data) > LARGE and not name.startswith(MAY_BE_LARGE):
        found.append(f"{name}: {len(data):,} bytes; {LARGE:,} are allowed")
    if b"\0" in data or not data or name.startswith(MAY_BE_LARGE):
        return found
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.endswith(b"\r"):
            found.append(f"{name}:{number}: carriage return")
        elif line != line.rstrip():
            found.append(f"{name}:{number}: white space at the end")
        if line.startswith(CONFLICT):
            found.append(f"{name}:{number}: mark of an unresolved merge")
    if not data.endswith(b"\n") or data.endswith(b"\n\n"):
        found.append(f"{name}: must end with one newline")
    return found


def main(names: list[str]) -> int:
    """Print the complaints; 1 if there are any."""
    if not names:
        listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
        names = [name for name in listed.split("\0") if name]
    found = [line for name in names if Path(name).is_file() for line in complaints(Path(name), name)]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
