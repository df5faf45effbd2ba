"""The class of the data sets: `RLHFDataset`, or one of the user's own."""

import inspect
from typing import cast

from verl.trainer.config.schema import CustomClassConfig
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.plugins import import_file

METHODS = ("__len__", "__getitem__", "batch", "place", "first_of_each_source", "questions_of_files")


def dataset_class(config: CustomClassConfig) -> type[RLHFDataset]:
    """`RLHFDataset`, or the class that `data.custom_cls` names: one derived from it, or one with its METHODS and the
    arguments of its constructor. Raises a one-line ValueError that names the key, the file and what is missing."""
    if config.path is None or config.name is None:
        if config.path != config.name:
            given, missing = ("path", "name") if config.name is None else ("name", "path")
            raise ValueError(f"data.custom_cls.{given} needs data.custom_cls.{missing}: set both, or neither")
        return RLHFDataset
    module = import_file(config.path, "data.custom_cls.path")
    cls = getattr(module, config.name, None)
    if not inspect.isclass(cls):
        own = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ValueError(
            f"data.custom_cls.name: {config.path} has no class {config.name!r}; it has {', '.join(own) or 'none'}"
        )
    where = f"data.custom_cls.name: class {config.name} of {config.path}"
    missing_methods = [name for name in METHODS if not callable(getattr(cls, name, None))]
    if missing_methods:
        raise ValueError(f"{where} has no method {', '.join(missing_methods)}: derive it from RLHFDataset")
    if issubclass(cls, RLHFDataset) and "__getitem__" in vars(cls) and "batch" not in vars(cls):
        raise ValueError(f"{where} overrides __getitem__, which batches do not call: override row(index, record)")
    try:
        inspect.signature(cls).bind("files", "tokenizer", "config", "key")
    except TypeError as error:
        raise ValueError(f"{where} does not take (files, tokenizer, config, key): {error}") from error
    return cast(type[RLHFDataset], cls)
