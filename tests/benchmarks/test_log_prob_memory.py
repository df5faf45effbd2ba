import json

import pytest

from benchmarks import log_prob_memory
from verl.utils.device import head_chunk_tokens


@pytest.mark.slow  # five new processes, gigabytes of logits
def test_at_a_large_vocabulary_memory_is_a_quarter_and_values_are_equal(tmp_path):
    tokens = 5 * head_chunk_tokens(log_prob_memory.DEVICE)
    log_prob_memory.main(["--tokens", str(tokens), "--hidden", "32", "--output", str(tmp_path / "memory.json")])
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["vocabulary"] == 151_936
    assert all(share <= 0.25 for share in report["chunked / plain"].values())
    assert all(difference <= 1e-5 for difference in report["largest difference"].values())
