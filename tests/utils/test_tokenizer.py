import pytest

from verl.utils.tokenizer import load_tokenizer


def test_what_cannot_be_loaded_is_named_in_one_line_with_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it is tried for most of a minute
    for path in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(
            ValueError, match=rf"^critic.model.path={path}: the tokenizer cannot be loaded; give a"
        ) as e:
            load_tokenizer(path, "critic.model.path")
        assert "\n" not in str(e.value)
