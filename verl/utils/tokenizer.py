"""The tokenizer of a model folder, and the tokens at which its responses end."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig


def load_tokenizer(model_path: str, key: str = "actor_rollout_ref.model.path") -> Any:
    """The tokenizer with a padding token (the end-of-sequence token where it has none) and a chat template.

    `key` is the configuration key that the path came from. Raises ValueError for what is missing.
    """
    looks_local = model_path.startswith(("/", ".", "~")) or model_path.count("/") != 1
    if looks_local and not Path(model_path).is_dir():
        raise ValueError(f"{key}={model_path}: there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={model_path}: the tokenizer cannot be loaded; give a Hugging Face folder, or a name where the "
            f"hub can be reached ({' '.join(str(error).split())[:200]})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{key}={model_path}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{key}={model_path}: the tokenizer has no chat template; add chat_template.jinja to the folder"
        )
    return tokenizer


def stop_token_ids(tokenizer: Any, generation_config: GenerationConfig | None) -> list[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation config."""
    stop = None if generation_config is None else generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [] if stop is None else [stop])})
