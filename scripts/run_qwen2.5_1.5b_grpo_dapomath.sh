#!/usr/bin/env bash
# GRPO (arXiv 2402.03300) on DAPO-Math-17k from DeepSeek-R1-Distill-Qwen-1.5B: the comparison for
# run_qwen2.5_1.5b_MVaR_dapomath.sh, whose header says how to start it.
#
#   bash scripts/run_qwen2.5_1.5b_grpo_dapomath.sh
#
# Environment variables: MODEL, DATA, GPUS, NODES (scripts/launch.sh). Arguments are Hydra overrides.
# Data, model, batch and lengths are those of the published RiskPO script; GRPO's are its paper's, without KL.
# Questions and mini-batches are 500 and 125, as there: the published 512 and 128 are no multiples of 5.
#
# Hardware: 8 GPUs of 80 GB. Expected: 29 to 42 hours on H100, an estimate (recipes/README.md), not measured.
source "$(dirname "$0")/launch.sh"
launch grpo/dapomath dapomath "$@"
