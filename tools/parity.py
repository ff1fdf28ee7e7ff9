"""Build one environment per peer library, then run the tests that compare with them.

    python tools/parity.py [PEER ...] [--build-only] [--checkout PATH]

A peer is a file `benchmarks/environments/PEER.txt` of pip requirements; its environment is `.venvs/PEER`, made once and
made again when the file changes. Peers have pins that fight each other and ours, so none is ever installed beside the
package. `TORCH_INDEX` names the index that torch comes from; unset means pip's own configuration. A line
`# without dependencies: A==1 B==2` of the file names packages that are installed after the rest, without what they ask
for. EAP-IG is on no index: PATH is a checkout of it, and without one the tests that need it are skipped.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "benchmarks" / "environments"
ENVIRONMENTS = ROOT / ".venvs"
STAMP = "requirements.txt"  # a copy of what the environment was built from, written last
ALONE = "# without dependencies:"


def is_built(peer: str) -> bool:
    """Whether the peer's environment was built to the end from the requirements as they are now."""
    stamp = ENVIRONMENTS / peer / STAMP
    return stamp.is_file() and stamp.read_text() == (REQUIREMENTS / f"{peer}.txt").read_text()


def build(peer: str) -> None:
    """Make `.venvs/PEER`; a half-built or outdated one is thrown away first."""
    folder = ENVIRONMENTS / peer
    requirements = REQUIREMENTS / f"{peer}.txt"
    text = requirements.read_text()
    if folder.exists():
        shutil.rmtree(folder)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = os.environ.get("TORCH_INDEX")
    torch = [line for line in text.splitlines() if line.startswith("torch==")]
    if index and torch:
        subprocess.run([*install, "--index-url", index, *torch], check=True)
    subprocess.run([*install, "-r", str(requirements)], check=True)
    for line in text.splitlines():
        if line.startswith(ALONE):
            subprocess.run([*install, "--no-deps", *line.removeprefix(ALONE).split()], check=True)
    (folder / STAMP).write_text(text)


def main() -> int:
    """Build what is missing, then run `pytest -m parity`; the exit code is pytest's, or pip's when a build fails."""
    known = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"one of: {', '.join(known)} (default: all)")
    parser.add_argument("--build-only", action="store_true", help="build the environments, run no tests")
    parser.add_argument("--checkout", type=Path, metavar="PATH", help="of EAP-IG (EAP_IG_CHECKOUT names it as well)")
    arguments = parser.parse_args()
    if arguments.checkout is not None and not (arguments.checkout / "src" / "eap").is_dir():
        parser.error(f"{arguments.checkout} is no checkout of EAP-IG: it has no src/eap")
    if unknown := set(arguments.peers) - set(known):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for peer in arguments.peers or known:
        if is_built(peer):
            print(f"{peer}: .venvs/{peer} is up to date", flush=True)
            continue
        print(f"{peer}: building .venvs/{peer} (minutes, once)", flush=True)
        try:
            build(peer)
        except subprocess.CalledProcessError as error:
            print(f"{peer}: its environment could not be built (see pip's message above)", file=sys.stderr)
            return error.returncode
    if arguments.build_only:
        return 0
    checkout = {} if arguments.checkout is None else {"EAP_IG_CHECKOUT": str(arguments.checkout.resolve())}
    command = [sys.executable, "-m", "pytest", "-m", "parity", "-rs"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **checkout}).returncode


if __name__ == "__main__":
    sys.exit(main())
