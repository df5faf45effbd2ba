"""Preset + overrides -> a checked configuration object.

Hydra composes; what Hydra would let pass (a `+` before a misspelt key) or refuse (a `+` before an existing one) is
evened out first: every key is checked against the schema, whatever its prefix.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.trainer.config.schema import PPOConfig, leaf_keys

PRESETS = Path(__file__).parent
T = TypeVar("T")


class ConfigError(ValueError):
    """A one-line message that names the key, its value and the remedy."""


def load_config(
    overrides: list[str],
    schema: type[T] = PPOConfig,  # type: ignore[assignment]
    preset: str = "ppo_trainer",
    preset_dir: Path = PRESETS,
) -> T:
    """Compose `preset` (a YAML file in `preset_dir`) with `key=value` overrides into an instance of `schema`.

    `+` and `++` before a key are allowed and change nothing. Raises ConfigError for an unknown key (with the nearest
    valid ones), a value of the wrong type, a missing preset, and a required key that is not set.
    """
    if not (preset_dir / f"{preset}.yaml").is_file():
        files = (path.relative_to(preset_dir).with_suffix("") for path in preset_dir.rglob("*.yaml"))
        known = ", ".join(sorted(path.as_posix() for path in files))
        raise ConfigError(f"--config-name={preset}: no such preset in {preset_dir}; there are {known}")
    ConfigStore.instance().store(name="schema", node=schema)
    checked = [_checked(text, schema) for text in overrides]
    try:
        with initialize_config_dir(str(preset_dir.resolve()), version_base="1.3"):
            composed = compose(preset, overrides=checked)
        OmegaConf.resolve(composed)
        missing = OmegaConf.missing_keys(composed)
        if missing:
            raise ConfigError(f"{sorted(missing)[0]} is required: add {sorted(missing)[0]}=...")
        return OmegaConf.to_object(composed)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        message = _one_line(error)
        if "is not in struct" in message:  # every override is in the schema, so the preset is not made from it
            message = (
                f"{preset_dir / preset}.yaml does not start from the schema: begin it with `defaults: [schema, _self_]`"
            )
        key = message.partition(":")[0]
        if "is not a ListConfig" in message:
            message = f"{message.rstrip('.')}; give a list: {key}=[{_plain_value(key, overrides)}]"
        if " " not in key and "." in key and key not in leaf_keys(schema):
            message = f"preset {preset}: unknown key {key}{suggestion(key, leaf_keys(schema))}"
        raise ConfigError(message) from error


def _plain_value(key: str, overrides: list[str]) -> str:
    """What was given for `key`, if it is no list."""
    values = [value for name, _, value in (text.lstrip("+").partition("=") for text in overrides) if name == key]
    return next((value for value in values if not value.startswith("[")), "...")


def _checked(text: str, schema: type) -> str:
    """The override with its prefix normalised, after its key was found in the schema."""
    text = text.lstrip("+")
    override = _parse(text)
    key = override.key_or_group
    leaves = leaf_keys(schema)
    if override.is_delete():
        raise ConfigError(f"~{key}: keys cannot be deleted; set another value")
    if key in leaves:
        return text
    if any(get_origin(field.type) is dict and key.startswith(name + ".") for name, field in leaves.items()):
        return "++" + text  # a new entry of a free dictionary, which Hydra takes for an unknown key
    raise ConfigError(f"unknown key {key}{suggestion(key, leaves)}")


def _parse(text: str) -> Override:
    if "=" not in text:
        raise ConfigError(f"{text!r} is not of the form key=value")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text!r} cannot be read: {_one_line(error)}") from error


def suggestion(key: str, known: Any) -> str:
    """`; did you mean ...` with the keys nearest to `key`, or with the keys below it if it is a section."""
    below = [name for name in known if name.startswith(key + ".")]
    if below:
        return f": it is a section; its keys are {', '.join(below[:6])}{', ...' if len(below) > 6 else ''}"
    last = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    near = same_name or difflib.get_close_matches(key, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near[:3])}?" if near else "; docs/config.md lists the keys"


def _one_line(error: BaseException) -> str:
    """The innermost cause, with the key it is about, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), None)
    return f"{key}: {lines[0]}" if key else lines[0]
