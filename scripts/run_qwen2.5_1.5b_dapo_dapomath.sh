#!/usr/bin/env bash
# DAPO (arXiv 2503.14476) on DAPO-Math-17k from DeepSeek-R1-Distill-Qwen-1.5B: the comparison for
# run_qwen2.5_1.5b_MVaR_dapomath.sh, whose header says how to start it.
#
#   bash scripts/run_qwen2.5_1.5b_dapo_dapomath.sh
#
# Environment variables: MODEL, DATA, GPUS, NODES (scripts/launch.sh). Arguments are Hydra overrides.
# Data, model, batch and lengths are those of the published RiskPO script; DAPO's are its paper's.
# Questions and mini-batches are 500 and 125, as there: the published 512 and 128 are no multiples of 5.
#
# Hardware: 8 GPUs of 80 GB. Expected: 29 to 42 hours on H100, an estimate (recipes/README.md), not measured;
# dynamic sampling multiplies the decoding by the batches it takes to fill a step.
source "$(dirname "$0")/launch.sh"
launch dapo/dapomath dapomath "$@"
