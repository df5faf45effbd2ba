"""The benchmark of the estimators runs and reports what it says; its times are not judged."""

import json
import sys

import pytest

from benchmarks import estimators
from verl.trainer.ppo.core_algos import ADV_ESTIMATORS


@pytest.mark.slow  # every estimator several times
def test_a_tiny_run_reports_machine_times_of_every_estimator_and_memory(tmp_path):
    memory = [] if sys.platform == "linux" else ["--no-memory"]
    estimators.main(["--sizes", "100", "--repeat", "1", *memory, "--output", str(tmp_path / "times.json")])
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1 and report["machine"]["threads_used"] == 1
    assert {"riskpo", *report["other estimators"]} == ADV_ESTIMATORS.keys()
    assert report["riskpo"][0]["responses"] == 100
    times = [*report["riskpo"], *report["riskpo, other choices"].values(), *report["other estimators"].values()]
    assert all(0 < time["best_ms"] <= time["median_ms"] for time in times)
    if not memory:
        assert report["riskpo memory"][0]["peak_growth_mib"] >= 0


def test_the_batch_is_what_estimators_are_handed():
    batch = estimators.make_batch(200, tokens=4)
    assert len(batch) == 200 and len(set(batch["uid"].tolist())) == 20
    assert batch["response_mask"].sum(1).min() >= 1
    assert set(batch["token_level_rewards"].sum(1).tolist()) == {0.0, 1.0}


def test_a_size_that_makes_no_whole_bundles_is_refused(capsys):
    with pytest.raises(SystemExit):
        estimators.main(["--sizes", "120"])
    assert "--sizes 120 is not a positive multiple of 50" in capsys.readouterr().err
