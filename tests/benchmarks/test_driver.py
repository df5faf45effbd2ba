import json

import pytest

from benchmarks import driver


@pytest.mark.slow  # starts Ray workers, four times
def test_a_tiny_run_reports_every_batch_and_the_drivers_share(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "QUICKSTART", (64, 8))
    driver.main(["--batches", "64x8", "--steps", "1", "--output", str(tmp_path / "driver.json")])
    report = json.loads((tmp_path / "driver.json").read_text())
    (entry,) = report["batches"]
    assert entry["rows"] == 64 and {"gen", "reward", "adv", "update_actor", "log", "step"} <= entry["seconds"].keys()
    assert entry["us_per_row"] == pytest.approx(1e6 * entry["seconds"]["own"] / 64, rel=0.01)
    quickstart = report["quickstart"]
    idle = quickstart["idle_s"]
    assert idle["delay"] == pytest.approx(idle["own"] - idle["meanwhile"], abs=1e-4) and idle["meanwhile"] > 0
    share = idle["delay"] / quickstart["real_s"]["step"]
    assert quickstart["driver_share"] == pytest.approx(share, abs=1e-3)
