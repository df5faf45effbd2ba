#!/usr/bin/env bash
# DAPO (arXiv 2503.14476) on MATH and GSM8K from Qwen2.5-1.5B-Instruct: the comparison for
# run_qwen2.5_1.5b_MVaR_math.sh, whose header says how to start it.
#
#   bash scripts/run_qwen2.5_1.5b_dapo_math.sh
#
# Environment variables: MODEL, DATA, GPUS, NODES (scripts/launch.sh). Arguments are Hydra overrides.
# Data, model, batch and lengths are those of the published RiskPO script; DAPO's are its paper's.
# Questions and mini-batches are 1,000 and 500, as there: the published 1,024 and 512 are no multiples of 5.
#
# Hardware: 4 GPUs of 80 GB. Expected: 6 to 13 hours on H100, an estimate (recipes/README.md), not measured;
# dynamic sampling multiplies the decoding by the batches it takes to fill a step.
source "$(dirname "$0")/launch.sh"
launch dapo/math easymath "$@"
