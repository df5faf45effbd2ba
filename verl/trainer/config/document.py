"""Writes docs/config.md from the schema: `python -m verl.trainer.config.document`."""

from pathlib import Path
from typing import Any

from omegaconf import MISSING

from verl.trainer.config.schema import PPOConfig, leaf_keys

HEADER = """# Configuration keys

Made from `verl/trainer/config/schema.py` by `python -m verl.trainer.config.document`. Any key can be given on the
command line as `key=value`; a misspelt one is refused with the nearest valid ones.

`train_batch_size` and `ppo_mini_batch_size` count questions, micro-batches count responses, `n_gpus_per_node` counts
training workers per node on any device.
"""


def default_of(field: Any) -> str:
    value = field.default_factory() if callable(field.default_factory) else field.default
    if value == MISSING:
        return "*required*"
    if isinstance(value, str) and value.startswith("${") and value.count("${") == 1:
        return f"follows `{value[2:-1]}`"
    return f"`{'null' if value is None else value}`"


def config_markdown() -> str:
    lines, current = [HEADER], ""
    for path, field in leaf_keys(PPOConfig).items():
        section = path.rsplit(".", 1)[0]
        if section != current:
            lines += [f"\n## {section}\n", "| key | default | meaning |", "|---|---|---|"]
            current = section
        lines.append(f"| `{path}` | {default_of(field)} | {field.metadata['help'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path("docs").mkdir(exist_ok=True)
    Path("docs/config.md").write_text(config_markdown(), encoding="utf-8")
