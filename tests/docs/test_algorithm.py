"""What docs/algorithm.md names exists, and what exists is named there."""

import re
from pathlib import Path

from verl.trainer.config.schema import PPOConfig, leaf_keys
from verl.trainer.ppo.core_algos import ADV_ESTIMATORS, POLICY_LOSSES
from verl.trainer.ppo.policy_losses import LOSS_AGG_MODES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "algorithm.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
FAMILIES = (
    "riskpo|quantile_tracking|quantile_baseline|actor|critic|reward|reward_extra|response_length|prompt_length|training"
    "|timing_s|perf|val-core|rollout|rollout_corr|global_seqlen"
)


def test_every_estimator_policy_loss_and_aggregation_is_described():
    assert (ADV_ESTIMATORS.keys() | POLICY_LOSSES.keys() | set(LOSS_AGG_MODES)) - set(CODE) == set()


def test_every_key_named_in_full_exists():
    keys = leaf_keys(PPOConfig)
    sections = {key.rpartition(".")[0] for key in keys}
    named = set(re.findall(r"\b(?:algorithm|actor_rollout_ref)\.[\w.]*\w", TEXT)) - {"algorithm.md"}
    assert len(named) > 20
    assert named - keys.keys() - sections == set()


def test_every_file_and_test_file_named_exists():
    named = re.findall(r"\b(?:verl|tests|docs|benchmarks)/[\w/]+\.(?:py|md)", TEXT)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_links_within_the_page_reach_a_heading():
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^##+ (.*)", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) - headings == set()


def test_every_metric_is_described():
    documented = " ".join(f"`{code}`" for code in CODE)
    patterns = {name: re.escape(name).replace("NAME", "[A-Z-]+") for name in logged_metrics()}
    missing = [name for name, pattern in patterns.items() if not re.search(f"`{pattern}[^`]*`", documented)]
    assert missing == [], "describe these metrics in docs/algorithm.md"


def logged_metrics():
    """The metric names in the code, with NAME for what is filled in; `reward/NAME` is spelt out in the docs."""
    quoted = re.compile(rf'"((?:{FAMILIES})/[\w/{{}}.:-]+)"')
    found = {name for path in (ROOT / "verl").rglob("*.py") for name in quoted.findall(path.read_text())}
    return sorted({re.sub(r"\{[^}]*\}", "NAME", name) for name in found} - {"reward/NAME"})
