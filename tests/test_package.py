import os
import subprocess
import sys
from pathlib import Path


def test_an_environment_with_the_other_verl_is_refused_in_one_line(tmp_path):
    info = tmp_path / "verl-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.9.0\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in (["-c", "import verl"], ["-m", "verl.trainer.main_ppo"]):
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
        )
        assert result.returncode != 0
        assert "distribution verl 0.9.0 besides riskpo" in result.stderr.splitlines()[-1]
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
