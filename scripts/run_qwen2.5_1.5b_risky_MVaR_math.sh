#!/usr/bin/env bash
# The risk-seeking counter-example of RiskPO (arXiv 2510.00911): the upper tail weighs more instead of the lower; the
# paper reports that its entropy collapses. MATH and GSM8K from Qwen2.5-1.5B-Instruct.
#
#   python data_processing/download_easymath.py --output-dir data/easymath     # once
#   bash scripts/run_qwen2.5_1.5b_risky_MVaR_math.sh                           # GPUS, NODES as in the next script
#   bash scripts/run_qwen2.5_1.5b_MVaR_math.sh                                 # to compare with: actor/entropy
#
# Environment variables: MODEL, DATA, GPUS, NODES, SETTINGS (scripts/launch.sh). Arguments are Hydra overrides.
#
# SETTINGS=published  the published script's: as run_qwen2.5_1.5b_MVaR_math.sh, but quantiles 0.2/0.8, no mixing,
#                     risk_seeking_upper_tail with upper_weight 1.5
# SETTINGS=paper      the paper's estimator with the weights (0, 1, 1 + omega) of its three regions, omega 0.5
# SETTINGS=exact      the same with this project's exact credit
# With random bundles and 0/1 rewards `paper` and `exact` have the mean's expected direction, as docs/algorithm.md says.
# 1,024 and 512 are no multiples of 5, hence 1,000 questions and mini-batches of 500, as there.
#
# Hardware: 4 GPUs of 80 GB. Expected: 6 to 13 hours on H100, an estimate (recipes/README.md), not measured.
source "$(dirname "$0")/launch.sh"
launch "riskpo/${SETTINGS:-published}/risky_math" easymath "$@"
