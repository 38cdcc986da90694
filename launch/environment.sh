# Sourced by quickstart.sh and test.sh from the repository root: makes .venv if there is none, installs the package with
# the extra named by $1 (may be empty) unless that is already there, and activates the environment.

extra="${1:-}"
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "largebatch: error: '$python' is not Python 3.10 or newer; set PYTHON to one that is" >&2
  exit 2
fi
if [ ! -x .venv/bin/python ]; then
  echo "making .venv with $("$python" --version)" >&2
  "$python" -m venv .venv || {
    echo "largebatch: error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
  }
fi
source .venv/bin/activate

# what is installed is named by the files that say what to install
stamp=".venv/largebatch-installed${extra:+-$extra}"
wanted="$(cat setup.cfg pyproject.toml | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing largebatch${extra:+ with the $extra extra} and what it needs (once; torch is large)" >&2
  python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  echo "$wanted" > "$stamp"
fi
