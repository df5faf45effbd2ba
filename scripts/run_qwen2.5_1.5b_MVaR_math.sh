#!/usr/bin/env bash
# RiskPO (arXiv 2510.00911) on MATH and GSM8K from Qwen2.5-1.5B-Instruct: the paper's easier maths run.
#
#   python data_processing/download_easymath.py --output-dir data/easymath     # once
#   bash scripts/run_qwen2.5_1.5b_MVaR_math.sh                                 # one node of 4 GPUs
#   GPUS=8 bash scripts/run_qwen2.5_1.5b_MVaR_math.sh                          # of 8
#   NODES=2 bash scripts/run_qwen2.5_1.5b_MVaR_math.sh                         # a Ray cluster, scripts/start_ray.sh
#   SETTINGS=paper bash scripts/run_qwen2.5_1.5b_MVaR_math.sh trainer.total_training_steps=100
#   bash scripts/run_qwen2.5_1.5b_grpo_math.sh                                 # to compare with; also dapo
#
# Environment variables: MODEL, DATA, GPUS, NODES, SETTINGS (scripts/launch.sh). Arguments are Hydra overrides.
#
# SETTINGS=published  the published script's: quantiles 0.2/0.9, bundles of 5, w_mix 1.5 (an omega of 4.25), std credit,
#                     token-level ratio clipped at 0.2
# SETTINGS=paper      the paper's: alpha 0.2, beta 0.8, omega 0.5, bundles of 5, sequence-level ratio
# SETTINGS=exact      the paper's objective with this project's exact credit
# In all: 5 responses of at most 1,024 tokens, learning rate 1e-6, no KL, engines on 2 GPUs, 200 steps, test every 5,
# save every 10. The script's 1,024 questions and mini-batches of 512 are no multiples of 5: 1,000 and 500 are, 500
# divides 1,000, and the 2,500 rows of a mini-batch divide among 4 GPUs (rows are shared out by tokens, so 8 do as well).
# For 1,024: data.train_batch_size=1024 actor_rollout_ref.actor.ppo_mini_batch_size=512 (published only).
#
# Hardware: 4 GPUs of 80 GB. Expected: 6 to 13 hours on H100, an estimate (recipes/README.md), not measured.
source "$(dirname "$0")/launch.sh"
launch "riskpo/${SETTINGS:-published}/math" easymath "$@"
