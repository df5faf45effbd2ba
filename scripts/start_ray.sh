#!/usr/bin/env bash
# One node of a Ray cluster, for the run_*.sh scripts. It runs until it is ended (Ctrl-C), which ends this node alone;
# use tmux, nohup or srun to keep it.
#
#   bash scripts/start_ray.sh head                  on the first node; prints the command for the others
#   bash scripts/start_ray.sh join ADDRESS:PORT     on every other node
#   NODES=2 bash scripts/run_....sh                 then on the first node, once all have joined
#
# Further arguments go to `ray start`, e.g. --num-gpus=4. RAY_PORT is the port of the first node (6379).
# All nodes need the same Python environment, and a folder in common for the runs (trainer.default_local_dir).
#
# Whoever reaches the port can run programs on the cluster, so nodes and drivers show a token. It is made on the first
# node, in ~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH says; the others need that file, which a shared home folder
# gives them. RAY_AUTH_MODE=disabled, on all of them, does without.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$repository/.venv/bin:$PATH"
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0  # else Ray hides GPUs from rollout engines, which claim none

usage() { echo "usage: bash scripts/start_ray.sh head | join ADDRESS:PORT, then options of ray start" >&2; exit 2; }
has_token() { [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$token_file" ]; }
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

case "${1:-}" in
  head)
    shift
    if [ "$RAY_AUTH_MODE" = token ] && ! has_token; then
      mkdir -p "$(dirname "$token_file")"
      (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token_file")
    fi
    port=${RAY_PORT:-6379}
    address=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
    echo "on every other node: bash scripts/start_ray.sh join $address:$port"
    [ "$RAY_AUTH_MODE" != token ] || echo "with this node's $token_file (or RAY_AUTH_TOKEN) there as well"
    exec ray start --head --port="$port" --include-dashboard=false --block "$@"
    ;;
  join)
    [ $# -ge 2 ] || usage
    address=$2
    shift 2
    if [ "$RAY_AUTH_MODE" = token ] && ! has_token; then
      echo "error: no token in $token_file: copy it from the first node (or set RAY_AUTH_TOKEN_PATH)" >&2
      exit 2
    fi
    exec ray start --address="$address" --block "$@"
    ;;
  *) usage ;;
esac
