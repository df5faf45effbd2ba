#!/usr/bin/env bash
# DAPO (arXiv 2503.14476) on MATH and GSM8K from Qwen2.5-1.5B-Instruct: the comparison for
# run_qwen2.5_1.5b_MVaR_math.sh, whose header says how to start it, on which hardware and for how long.
#
#   bash scripts/run_qwen2.5_1.5b_dapo_math.sh
#
# Environment variables: MODEL, DATA, GPUS, NODES (scripts/launch.sh). Arguments are Hydra overrides.
# Data, model, batch and lengths are those of the published RiskPO script; DAPO's are its paper's.
# Dynamic sampling samples several batches for a step: expect as many times the generation.
source "$(dirname "$0")/launch.sh"
launch dapo/math easymath "$@"
