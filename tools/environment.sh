#!/bin/sh
# Make .venv, or leave it alone when it is what pyproject.toml and constraints.txt ask for.
#
#   PYTHON       the interpreter to make it with (default: python3)
#   TORCH_INDEX  the index that torch, and only torch, comes from (default: pip's own configuration)
#
# The stamp is written last. Without one the environment was never finished, so it is thrown away; with another one the
# new requirements are installed over the old.
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
stamp=.venv/cutaway-environment

stop() {
    echo "$1" >&2
    exit 1
}

command -v "$PYTHON" >/dev/null 2>&1 ||
    stop "$PYTHON is missing: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv), or name one with PYTHON=..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    stop "$PYTHON is too old ($("$PYTHON" -V 2>&1)): Python 3.11 or newer is needed, name one with PYTHON=..."
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    stop "$PYTHON cannot make virtual environments: install python3-venv (Debian: apt-get install python3-venv)"

# Two makes at once: the second waits for the first.
if command -v flock >/dev/null 2>&1; then
    exec 9<pyproject.toml
    flock 9
fi

# What the environment is tied to (it cannot be moved), and what was installed into it.
base=$("$PYTHON" -c 'import os, sys; print(sys.version.split()[0], sys.base_prefix, os.getcwd())')
wanted="$base
$("$PYTHON" -c '
import hashlib
for name in ("pyproject.toml", "constraints.txt"):
    print(hashlib.sha256(open(name, "rb").read()).hexdigest(), name)
')"

found=
if [ -f "$stamp" ] && .venv/bin/python -c '' 2>/dev/null; then
    found=$(cat "$stamp")
fi
[ "$found" = "$wanted" ] && exit 0

install() {
    .venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt "$@"
}

install_all() {
    if [ -n "${TORCH_INDEX:-}" ]; then
        install --index-url "$TORCH_INDEX" torch || return 1
    fi
    install -e '.[dev]'
}

if [ "$(printf '%s\n' "$found" | head -n 1)" = "$base" ]; then
    echo "updating .venv (pyproject.toml or constraints.txt changed)"
    mv "$stamp" "$stamp.old"
    if ! install_all; then
        mv "$stamp.old" "$stamp" # pip refused before it changed anything: the old environment still stands
        stop "pip could not install what pyproject.toml asks for (its message is above)"
    fi
    rm -f "$stamp.old"
else
    echo "building .venv (once, a minute or more; TORCH_INDEX=... names an index with torch for CPUs)"
    rm -rf .venv
    "$PYTHON" -m venv .venv
    install_all || stop "pip could not install the package (its message is above); the same command tries again"
fi
.venv/bin/python -c 'import cutaway' || stop "the package was installed but cannot be imported"
printf '%s\n' "$wanted" >"$stamp"
