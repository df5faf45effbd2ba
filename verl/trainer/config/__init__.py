"""Configuration from presets and `key=value` overrides, checked against the typed schema."""

from verl.trainer.config.compose import ConfigError, load_config
from verl.trainer.config.schema import PPOConfig

__all__ = ["ConfigError", "PPOConfig", "load_config"]
