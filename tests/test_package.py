import subprocess
import sys


def test_an_environment_with_the_other_verl_is_refused_in_one_line(tmp_path):
    info = tmp_path / "verl-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.9.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import verl"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "distribution verl 0.9.0 besides riskpo" in result.stderr.splitlines()[-1]
