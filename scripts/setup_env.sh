#!/bin/sh
# Make .venv usable: `.venv/bin/python` then runs everything in this repository.
#
#   an active environment   .venv becomes a link to it
#   a Python with torch     a new .venv on top of it, as in a container image
#   any other Python        a new .venv with the versions pinned in pyproject.toml
#
# A torch that was there before is kept as it is: pip may neither replace nor upgrade it.
# Nothing happens when .venv was made for this directory after the last change of pyproject.toml.
# The stamp that says so holds the directory and the extras that were installed.
set -eu

python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
stamp=.venv/.bridge-setup
cd "$root"

fail() {
    echo "setup: $*" >&2
    exit 1
}

up_to_date() {
    [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$root" ] &&
        [ -z "$(find pyproject.toml scripts/setup_env.sh -newer "$stamp")" ]
}

require_version() {
    command -v "$1" >/dev/null || fail "no $1 here; name a Python >= 3.10 with: make setup PYTHON=/path/to/python"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "bridge needs Python >= 3.10, but $1 is $("$1" -V 2>&1); name another one with: make setup PYTHON=/path/to/python"
}

imports_torch() {
    "$1" -c 'import torch' >/dev/null 2>&1
}

create_venv() {
    echo "setup: a new environment in .venv, from $python $*"
    if ! "$python" -m venv "$@" .venv; then
        rm -rf .venv
        fail "$python -m venv failed; on Debian and Ubuntu, install python3-venv"
    fi
}

# A few tests run under strace, and are skipped where it is not there. Its absence is no error.
install_strace() {
    if ! command -v strace >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get install --yes strace || { apt-get update && apt-get install --yes strace; }; } >/dev/null 2>&1 || true
    fi
}

if up_to_date; then
    exit 0
fi
install_strace

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -x .venv/bin/python ]; then
    echo "setup: bringing .venv up to date"
elif [ -e .venv ] && [ ! -L .venv ]; then
    fail "$root/.venv is there but holds no bin/python; move it away or delete it"
else
    rm -f .venv # a link whose target is gone
    if [ -n "$active" ] && [ -x "$active/bin/python" ]; then
        require_version "$active/bin/python"
        echo "setup: .venv is a link to the active environment $active"
        ln -s "$active" .venv
    else
        require_version "$python"
        if imports_torch "$python"; then
            create_venv --system-site-packages
        else
            create_venv
        fi
    fi
fi

require_version .venv/bin/python
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null ||
    fail ".venv has no pip, and ensurepip could not install it"

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
extras=dev,pinned
if [ "$(sed -n 2p "$stamp" 2>/dev/null)" != "$extras" ] && imports_torch .venv/bin/python; then
    extras=dev
    .venv/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$constraints"
    echo "setup: keeping $(cat "$constraints")"
fi
printf '\n%s\n' "$extras" >"$stamp" # an interrupted installation goes on with the same choice
echo "setup: installing bridge[$extras]; the first time takes a few minutes"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$extras]"
printf '%s\n' "$root" "$extras" >"$stamp"
echo "setup: done; .venv/bin/python is $(.venv/bin/python -V)"
