"""Where metrics and samples of a run go: the console, metrics.jsonl, TensorBoard, Weights & Biases, samples/."""

import importlib.util
import json
import math
import netrc
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from verl.trainer.config.schema import PPOConfig
from verl.utils.run_folder import set_aside
from verl.workers.reward.outcomes import FAILURES

Metrics = Mapping[str, float]


class Tracking:
    """One run's trackers. `start` opens them, `log` and `log_samples` write, `finish` closes.

    Args:
        loggers: names from `LOGGERS`.
        run_dir: folder of the run; it gets `config.yaml` and `samples/{split}_step_{k}.jsonl` whatever the loggers.
        project_name, experiment_name: how TensorBoard's and wandb's runs are called.
        config: the resolved configuration.
        shown_samples: validation samples shown in the trackers, beside the file.
    """

    def __init__(
        self,
        loggers: Sequence[str],
        run_dir: str | Path,
        project_name: str,
        experiment_name: str,
        config: dict[str, Any],
        shown_samples: int = 0,
    ):
        check_loggers(loggers)
        self.run_dir = Path(run_dir)
        self.config = config
        self.shown_samples = shown_samples
        self._step = -1
        self._loggers = [
            LOGGERS[name](self.run_dir, project_name, experiment_name, config) for name in dict.fromkeys(loggers)
        ]

    @classmethod
    def from_config(cls, config: PPOConfig) -> "Tracking":
        trainer = config.trainer
        return cls(
            trainer.logger,
            trainer.default_local_dir,
            trainer.project_name,
            trainer.experiment_name,
            asdict(config),
            trainer.log_val_generations,
        )

    def start(self, step: int, total_steps: int) -> None:
        """Open the trackers of a run that has done `step` of `total_steps` steps. What an earlier run in this folder
        logged after that step is dropped (at step 0: all is set aside), so that the files tell one run."""
        self._step = step if step > 0 else -1
        if step == 0:
            set_aside(self.run_dir, checkpoints=False)
        (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(self.config), self.run_dir / "config.yaml")
        for path in (self.run_dir / "samples").glob("*_step_*.jsonl"):
            if int(path.stem.rsplit("_", 1)[1]) > step:
                path.unlink()
        for logger in self._loggers:
            logger.start(step, total_steps)

    def log(self, metrics: Metrics, step: int) -> None:
        """All metrics of a step, at once; steps go up."""
        if step <= self._step:
            raise ValueError(f"metrics of step {step} come after those of step {self._step}: log a step once, in order")
        self._step = step
        numbers = {name: as_number(value) for name, value in metrics.items()}
        for logger in self._loggers:
            logger.log(numbers, step)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]], split: str) -> None:
        """Write samples/{split}_step_{step}.jsonl, an object per row; some of `val` are shown in the trackers too."""
        with (self.run_dir / "samples" / f"{split}_step_{step}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(to_json(row) + "\n" for row in rows)
        if split == "val" and self.shown_samples and rows:
            # Spread over the rows: the responses to one question are neighbours.
            chosen = np.linspace(0, len(rows) - 1, min(self.shown_samples, len(rows))).astype(int)
            for logger in self._loggers:
                logger.show_samples([rows[i] for i in chosen], step)

    def finish(self) -> None:
        for logger in self._loggers:
            logger.finish()


class Logger(Protocol):
    """What a tracker does. It touches nothing outside before `start`."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: dict[str, Any]): ...
    def start(self, step: int, total_steps: int) -> None: ...
    def log(self, metrics: Metrics, step: int) -> None: ...
    def show_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...
    def finish(self) -> None: ...


class ConsoleLogger:
    """A progress bar with the few numbers that matter; one line per step where the output is no terminal."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: dict[str, Any]):
        self.console = Console(highlight=False, soft_wrap=True)
        self.name = experiment
        self.total_steps = 0
        self.validation = ""  # stays in the bar until the next one
        self.progress: Progress | None = None

    def start(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        if self.console.is_terminal:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self.console)
            self.progress.add_task(self.name, total=total_steps, completed=step, numbers="")
            self.progress.start()

    def log(self, metrics: Metrics, step: int) -> None:
        numbers = console_numbers(metrics)
        if self.progress is None:
            self.console.print(f"step {step}/{self.total_steps}  " + "  ".join(numbers), markup=False)
            return
        new = [text for text in numbers if text.startswith("val ")]
        self.validation = new[0] if new else self.validation
        others = [text for text in numbers if not text.startswith("val ")]
        text = "  ".join(filter(None, [*others, self.validation]))
        self.progress.update(self.progress.task_ids[0], completed=step, numbers=text, refresh=True)

    def show_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for row in rows:
            text = f"{row['prompt']} -> {row['response']}  (reward {row['reward']:g})"
            self.console.print(f"sample of step {step}: {text}", markup=False)

    def finish(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def console_numbers(metrics: Metrics) -> list[str]:
    """Reward, entropy, validation score (the mean over data sources), failed rewards and seconds, those of them that
    there are."""
    validation = [value for name, value in metrics.items() if re.fullmatch(r"val-core/.+/acc/mean@\d+", name)]
    numbers = {
        "reward": metrics.get("critic/score/mean"),
        "entropy": metrics.get("actor/entropy"),
        "val": float(np.mean(validation)) if validation else None,
    }
    texts = [f"{name} {value:.3f}" for name, value in numbers.items() if value is not None]
    for prefix, name in (("", "rewards"), ("val-aux/", "validation rewards")):
        failed = sum(metrics.get(f"{prefix}reward/{kind}", 0) for kind in FAILURES)
        if failed:
            texts.append(f"{failed:.0f} of {metrics[prefix + 'reward/responses']:.0f} {name} failed")
    if "timing_s/step" in metrics:
        texts.append(f"{metrics['timing_s/step']:.2f} s/step")
    return texts


class JsonlLogger:
    """metrics.jsonl in the run's folder: one object per step, the step under `step`, non-finite numbers as null."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: dict[str, Any]):
        self.path = run_dir / "metrics.jsonl"

    def start(self, step: int, total_steps: int) -> None:
        if self.path.exists():
            kept, dropped = lines_up_to(self.path, step)
            rewritten = self.path.with_suffix(".jsonl.part")
            rewritten.write_text("".join(kept), encoding="utf-8")
            rewritten.replace(self.path)
            if dropped:
                print(f"{self.path}: dropped {dropped} lines of an earlier run after step {step}")

    def log(self, metrics: Metrics, step: int) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step, **metrics}) + "\n")

    def show_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        pass  # samples/ has them all

    def finish(self) -> None:
        pass


def lines_up_to(path: Path, step: int) -> tuple[list[str], int]:
    """The lines of a metrics.jsonl up to a step, and how many others there are, a half-written last one included."""
    with path.open(encoding="utf-8", newline="\n") as file:
        lines = file.readlines()
    kept = []
    for number, line in enumerate(lines):
        if not line.endswith("\n"):  # the run was killed while it wrote
            break
        try:
            logged = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number + 1} is not an object with a step: move the file away") from error
        if logged <= step:
            kept.append(line)
    return kept, len(lines) - len(kept)


class TensorboardLogger:
    """TensorBoard event files in the run's folder."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: dict[str, Any]):
        require("tensorboard")
        self.folder = run_dir / "tensorboard"
        self.writer: Any = None

    def start(self, step: int, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events from purge_step on, of an earlier run in the folder, are hidden.
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step > 0 else 0)

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        text = "\n\n---\n\n".join("\n".join(f"    {key}: {value}" for key, value in row.items()) for row in rows)
        self.writer.add_text("val/samples", text, step)

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbLogger:
    """Weights & Biases; offline, with a line saying so, when not logged in. A resumed run stays the same wandb run."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: dict[str, Any]):
        require("wandb")
        self.run_dir, self.project, self.experiment, self.config = run_dir, project, experiment, config
        self.run: Any = None

    def start(self, step: int, total_steps: int) -> None:
        import wandb

        offline = "WANDB_MODE" not in os.environ and not wandb_logged_in()
        if offline:
            print(f"wandb: not logged in, the run is kept offline in {self.run_dir}/wandb (`wandb sync` uploads it)")
        id_file = self.run_dir / "wandb_id"
        if step == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=self.project,
            name=self.experiment,
            dir=str(self.run_dir),
            config=self.config,
            id=id_file.read_text(),
            resume="allow",
            mode="offline" if offline else None,
            settings=wandb.Settings(quiet=True),
        )

    def log(self, metrics: Metrics, step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def show_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        import wandb

        columns: list[str | int] = list(rows[0])
        # Without commit: the table belongs to the metrics of the same step, which follow.
        table = wandb.Table(columns=columns, data=[[row[str(column)] for column in columns] for row in rows])
        self.run.log({"val/samples": table}, step=step, commit=False)

    def finish(self) -> None:
        if self.run is not None:
            self.run.finish()


LOGGERS: dict[str, type[Logger]] = {
    "console": ConsoleLogger,
    "jsonl": JsonlLogger,
    "tensorboard": TensorboardLogger,
    "wandb": WandbLogger,
}


def check_loggers(loggers: Sequence[str]) -> None:
    """ValueError for a name that is no logger."""
    for name in loggers:
        if name not in LOGGERS:
            raise ValueError(f"trainer.logger has {name!r}; there are {', '.join(LOGGERS)}")


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"trainer.logger has {package!r}, which is not installed: pip install {package}, or leave it out"
        )


def wandb_logged_in() -> bool:
    """Whether wandb has a key: in the environment, or where `wandb login` keeps it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    return path.is_file() and host is not None and netrc.netrc(str(path)).authenticators(host) is not None


STRICT_JSON = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
PLAIN = frozenset({str, int, bool, type(None)})  # written by json as they are


def as_number(value: Any) -> float:
    """A plain int or float from a number of Python, numpy or torch."""
    if isinstance(value, torch.Tensor | np.generic | np.ndarray):
        value = value.item()
    return value if type(value) is int else float(value)


def to_json(row: Mapping[str, Any]) -> str:
    """One line of strict JSON; numpy's and torch's values become plain ones, NaN and infinities null."""
    return STRICT_JSON.encode({key: _plain(value) for key, value in row.items()})


def _plain(value: Any) -> Any:
    if type(value) in PLAIN:  # most are: a look at each of the kinds below takes longer than writing the line
        return value
    if isinstance(value, torch.Tensor | np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)
