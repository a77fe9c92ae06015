#!/bin/sh
# Makes a virtual environment with everything to develop tiermem: scripts/make_venv.sh DIRECTORY
#
# Without a suitable torch on this machine, all of it comes from the package index, pinned by constraints.txt.
# Where python3 has torch of at least 2.11 already, that one and all that lies beside it are used; only what is
# missing is installed, and where no package index is within reach, the build still works with what is there.
# An environment that is there already is brought up to date. PYTHON=... chooses the interpreter of a new one.
set -eu

venv=$1
extras=dev
# Python compiles what is imported when it is, and keeps it; pip would compile all of torch and transformers now.
unset PYTHONDONTWRITEBYTECODE
cd "$(dirname "$0")/.."

say() { echo "make_venv: $*" >&2; }
fail() { say "$*"; exit 1; }

runs() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }

has_torch() {
  "$1" - 2>/dev/null <<'PYTHON'
import re, sys, torch
sys.exit(tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11))
PYTHON
}

# The interpreter's full path: once $venv is there, its own programs come first.
choose_python() {
  if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" || fail "PYTHON=$PYTHON: must be Python 3.10 to 3.13"
    command -v "$PYTHON"
    return
  fi
  if runs python3 && has_torch python3; then
    command -v python3
    return
  fi
  for candidate in python3.11 python3 python3.12 python3.13 python3.10; do
    if runs "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.10 to 3.13 found; set PYTHON"
}

# Packages to build with that are on no PATH here.
build_tools() {
  command -v cmake >/dev/null || echo cmake
  command -v ninja >/dev/null || echo ninja
}

# Everything pinned by constraints.txt, torch among it.
pinned_environment() {
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
    fail "$python -m venv failed; on Debian: apt-get install python3-venv"
  pip="$venv/bin/python -m pip --disable-pip-version-check"
  $pip install -q --no-compile -c constraints.txt scikit-build-core nanobind $(build_tools)
  $pip install -q --no-compile -c constraints.txt --no-build-isolation -e ".[$extras]"
}

# A new environment whose path ends with that of $python. A .pth file rather than --system-site-packages, since
# $python may itself belong to a virtual environment.
borrow() {
  mkdir -p "$venv"
  touch "$venv/.borrows"
  "$python" -m venv --without-pip "$venv"
  "$python" - "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PYTHON'
import pathlib, site, sys
places = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
pathlib.Path(sys.argv[1], "borrowed.pth").write_text("\n".join(places) + "\n")
PYTHON
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
}

# An environment that sees the packages of $python, whose torch is suitable.
borrowing_environment() {
  [ -e "$venv/pins.txt" ] || borrow
  pip="$venv/bin/python -m pip --disable-pip-version-check --retries 0 --timeout 10"
  pins=$venv/pins.txt
  "$venv/bin/python" - >"$pins" <<'PYTHON'
import importlib.metadata, re
there = {re.sub(r"[-_.]+", "-", d.name).lower() for d in importlib.metadata.distributions()}
for line in open("constraints.txt"):
    if line.split("==")[0].strip().lower() not in there:
        print(line, end="")
PYTHON
  if {
    $pip install -q --no-compile -c "$pins" scikit-build-core nanobind $(build_tools) &&
      $pip install -q --no-compile -c "$pins" --no-build-isolation -e ".[$extras]"
  } 2>"$venv/pip.log"; then
    return
  fi
  say "no package index has all that is missing ($venv/pip.log); building with what $python has"
  $pip install -q --no-compile --no-build-isolation --no-deps -e .
}

if [ -x "$venv/bin/python" ]; then
  python=$venv/bin/python
else
  python=$(choose_python)
fi
if [ -e "$venv/.borrows" ] || { [ ! -e "$venv" ] && has_torch "$python"; }; then
  say "using $python, which has a suitable torch"
  borrowing_environment
else
  say "using $python; torch and the rest are installed"
  pinned_environment
fi
"$venv/bin/python" -c 'import torch, tiermem._core; print("make_venv: ready, torch", torch.__version__)' >&2
