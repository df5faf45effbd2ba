"""The tokenizer of a model folder, and the tokens at which its responses end."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig


def load_tokenizer(model_path: str) -> Any:
    """The tokenizer with a padding token (the end-of-sequence token where it has none) and a chat template."""
    looks_local = model_path.startswith(("/", ".", "~")) or model_path.count("/") != 1
    if looks_local and not Path(model_path).is_dir():
        raise ValueError(f"actor_rollout_ref.model.path={model_path}: there is no such folder")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"actor_rollout_ref.model.path={model_path}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        raise ValueError(
            f"actor_rollout_ref.model.path={model_path}: the tokenizer has no chat template; "
            "add chat_template.jinja to the folder"
        )
    return tokenizer


def stop_token_ids(tokenizer: Any, model_path: str) -> list[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation config."""
    ids = {tokenizer.eos_token_id}
    if (Path(model_path) / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(model_path).eos_token_id
        ids |= set(stop) if isinstance(stop, list) else ({stop} if stop is not None else set())
    return sorted(ids)
