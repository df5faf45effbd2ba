import json

import pytest
import torch

from benchmarks import update

SHAPE = {
    **{"rows": 4, "prompt": 8, "response": 24, "budget": 64, "steps": 2},
    **{"layers": 2, "hidden": 32, "heads": 4, "kv-heads": 2, "intermediate": 48, "vocabulary": 100},
}


def test_a_tiny_run_reports_tokens_and_operations(tmp_path):
    sizes = [text for name, size in SHAPE.items() for text in (f"--{name}", str(size))]
    update.main([*sizes, "--output", str(tmp_path / "update.json"), "actor_rollout_ref.actor.optim.lr=1e-4"])
    report = json.loads((tmp_path / "update.json").read_text())
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
    assert report["tokens"] == 4 * 32 and report["matrix_parameters"] == 2 * layer + 100 * 32
    assert len(report["seconds"]) == 2 and report["overrides"] == ["actor_rollout_ref.actor.optim.lr=1e-4"]
    operations = 4 * (6 * report["matrix_parameters"] * 32 + 2 * 6 * 32 * 32 * 33)  # heads x their size: 32
    assert report["operations"] == operations and report["tokens_per_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes the real shape")
def test_the_real_shape_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        update.main([])
    assert "needs a GPU" in capsys.readouterr().err
