#!/usr/bin/env bash
# RiskPO (arXiv 2510.00911) on DAPO-Math-17k from DeepSeek-R1-Distill-Qwen-1.5B: the paper's hard maths run.
#
#   python data_processing/download_dapomath.py --output-dir data/dapomath     # once
#   bash scripts/run_qwen2.5_1.5b_MVaR_dapomath.sh                             # one node of 8 GPUs
#   GPUS=4 bash scripts/run_qwen2.5_1.5b_MVaR_dapomath.sh                      # of 4
#   NODES=2 bash scripts/run_qwen2.5_1.5b_MVaR_dapomath.sh                     # a Ray cluster, scripts/start_ray.sh
#   SETTINGS=paper bash scripts/run_qwen2.5_1.5b_MVaR_dapomath.sh trainer.total_training_steps=100
#   bash scripts/run_qwen2.5_1.5b_grpo_dapomath.sh                             # to compare with; also dapo
#
# Environment variables: MODEL, DATA, GPUS, NODES, SETTINGS (scripts/launch.sh). Arguments are Hydra overrides.
#
# SETTINGS=published  the published script's: quantiles 0.2/0.8, bundles of 5, w_mix 1.5 (an omega of 3.5), sum-mean
#                     credit, token-level ratio clipped at 0.2
# SETTINGS=paper      the paper's: alpha 0.2, beta 0.8, omega 0.5, bundles of 5, sequence-level ratio
# SETTINGS=exact      the paper's objective with this project's exact credit
# In all: 10 responses of at most 3,072 tokens, learning rate 1e-6, no KL, sequence parallel 4, engines on 2 GPUs,
# weights offloaded, 500 steps, test every 5, save every 10. The script's 512 questions and mini-batches of 128 are no
# multiples of 5: 500 and 125 are, 125 divides 500, and the 1,250 rows of a mini-batch divide among the 2 data-parallel
# groups of 8 GPUs. For 512: data.train_batch_size=512 actor_rollout_ref.actor.ppo_mini_batch_size=128 (published only).
#
# Hardware: 8 GPUs of 80 GB. Expected: 29 to 42 hours on H100, an estimate (recipes/README.md), not measured.
source "$(dirname "$0")/launch.sh"
launch "riskpo/${SETTINGS:-published}/dapomath" dapomath "$@"
