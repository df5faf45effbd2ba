# What the run_*.sh scripts share; they source it. Environment variables, all optional:
#
#   MODEL     model folder or hub name               (the recipe's)
#   DATA      folder that the data script made       (data/dapomath or data/easymath)
#   GPUS      GPUs of each node                      (the recipe's)
#   NODES     nodes; more than 1: of a running Ray cluster, see scripts/start_ray.sh   (1)
#   SETTINGS  RiskPO alone: published, paper or exact, see recipes/riskpo/README.md    (published)
#
# RAY_ADDRESS names the cluster, if it is not one that this machine belongs to. Paths are relative to the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

# launch PRESET DATA_SET [OVERRIDE ...]: DATA_SET as in data_processing/download_DATA_SET.py
launch() {
  local preset=$1 data_set=$2
  shift 2
  export DATA=${DATA:-data/$data_set}
  if ! compgen -G "$DATA/*.parquet" > /dev/null; then
    echo "error: there are no parquet files in DATA=$DATA; make them with" \
      "python data_processing/download_$data_set.py --output-dir $DATA" >&2
    exit 2
  fi
  # Ray takes its token along to a cluster that it finds by itself, not to one with an address.
  local token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [ -n "${RAY_ADDRESS:-}" ] && { [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$token" ]; }; then
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
  fi
  exec python -m verl.trainer.main_ppo --config-dir=recipes --config-name="$preset" \
    ${MODEL:+"actor_rollout_ref.model.path='$MODEL'"} \
    ${GPUS:+"trainer.n_gpus_per_node=$GPUS"} \
    ${NODES:+"trainer.nnodes=$NODES"} \
    "$@"
}
