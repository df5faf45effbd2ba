#!/usr/bin/env bash
# GRPO (arXiv 2402.03300) on MATH and GSM8K from Qwen2.5-1.5B-Instruct: the comparison for
# run_qwen2.5_1.5b_MVaR_math.sh, whose header says how to start it.
#
#   bash scripts/run_qwen2.5_1.5b_grpo_math.sh
#
# Environment variables: MODEL, DATA, GPUS, NODES (scripts/launch.sh). Arguments are Hydra overrides.
# Data, model, batch and lengths are those of the published RiskPO script; GRPO's are its paper's, without KL.
# Questions and mini-batches are 1,000 and 500, as there: the published 1,024 and 512 are no multiples of 5.
#
# Hardware: 4 GPUs of 80 GB. Expected: 6 to 13 hours on H100, an estimate (recipes/README.md), not measured.
source "$(dirname "$0")/launch.sh"
launch grpo/math easymath "$@"
