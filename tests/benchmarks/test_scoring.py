"""The benchmark of scoring runs and reports what it says; its times are not judged."""

import json

import pytest

from benchmarks import scoring
from verl.utils.reward_score import compute_score
from verl.workers.reward.outcomes import ScorerDied, ScoringTimeout


def right(requests) -> list[bool]:
    return [
        compute_score(request.data_source, request.solution_str, request.ground_truth)["acc"] == 1
        for request in requests
    ]


def test_every_second_answer_of_the_generated_workloads_is_right():
    for workload in (scoring.gsm8k_answers, scoring.boxed_fractions):
        assert right(workload(20)) == [True, False] * 10


def test_one_percent_of_a_batch_hangs_and_one_percent_crashes():
    requests = scoring.gsm8k_answers(300)
    bad = [request.solution_str for request in scoring.disturbed(requests, scoring.HANG, scoring.CRASH)]
    assert [i for i, text in enumerate(bad) if text == scoring.HANG] == [50, 150, 250]
    assert [i for i, text in enumerate(bad) if text == scoring.CRASH] == [99, 199, 299]
    assert sum(text == request.solution_str for text, request in zip(bad, requests, strict=True)) == 294


@pytest.mark.slow  # a pool per measurement, a time-out of a second, processes that import numpy
def test_a_small_run_reports_throughput_and_outcomes(tmp_path):
    scoring.main(["--calls", "100", "--rounds", "1", "--output", str(tmp_path / "scoring.json")])
    report = json.loads((tmp_path / "scoring.json").read_text())
    assert report["workers"] == 2 and report["machine"]["cores"] >= 1
    assert set(report["throughput"]) == set(scoring.WORKLOADS)
    for name, found in report["throughput"].items():
        assert found["right"] == sum(right(scoring.WORKLOADS[name](100)))
        assert found["per_s_in_one_process"] > 0 and found["per_s_in_the_pool"] > 0
    found = report["hanging and crashing calls"]
    assert (found["timeouts"], found["deaths"], found["scored"]) == (1, 1, 98)
    assert found["every_outcome_is_the_expected_one"]
    assert found["hanging_and_crashing_s"] >= scoring.TIMEOUT_S and found["processes_started_meanwhile"] >= 2


def test_outcomes_are_compared_call_by_call():
    requests = scoring.disturbed(scoring.gsm8k_answers(100), scoring.HANG, scoring.CRASH)
    results = [float(i) for i in range(100)]
    results[50], results[99] = ScoringTimeout(), ScorerDied()
    counts = {"timeouts": 1, "deaths": 1, "scored": 98}
    good = [float(i) for i in range(100)]
    assert scoring.outcomes(results, good, requests) == (counts, True)
    results[50], results[49] = results[49], results[50]
    assert scoring.outcomes(results, good, requests) == (counts, False)


def test_a_batch_too_small_for_one_percent_is_refused(capsys):
    with pytest.raises(SystemExit):
        scoring.main(["--calls", "99"])
    assert "--calls 99 must be at least 100" in capsys.readouterr().err
