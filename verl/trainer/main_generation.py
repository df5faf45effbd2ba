"""`python -m verl.trainer.main_generation key=value ...`: n responses to each question, written as parquet.

Questions are sampled in parts; a run that was stopped goes on after its last part. `main_eval` scores what is written.
"""

import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from omegaconf import OmegaConf

from verl.export import find_checkpoint
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup, create_worker_group
from verl.trainer.cli import run_cli
from verl.trainer.config.evaluation_schema import GenerationConfig
from verl.trainer.config.schema import (
    ActorRolloutRefConfig,
    DataConfig,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
    TrainerConfig,
)
from verl.trainer.config.validate import check_truncated_sampling
from verl.trainer.evaluation.parts import PartedFile
from verl.trainer.main_ppo import check_context_length, cluster_device
from verl.trainer.ppo.generation import sample_to_measure
from verl.utils.checkpoint import file_crc32, find_fault, read_manifest
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.run_folder import LOCK, RunLock
from verl.utils.tokenizer import load_tokenizer
from verl.workers.rollout.base import GenerationOutput, OnFinished, Rollout, SamplingParams, WorkerRollout
from verl.workers.rollout.engine_pool import EngineError
from verl.workers.rollout.engine_rollout import EngineRollout
from verl.workers.rollout.sampling_worker import GenerationWorker
from verl.workers.rollout.vllm_checks import check_vllm

NEW_COLUMNS = ("responses", "response_lengths", "finished")
UNLIMITED = 1 << 30
PROGRESS_S = 60.0
# The names that checks shared with training use -> those of this configuration.
TERMS = {
    "actor_rollout_ref.": "",
    "data.max_prompt_length": "rollout.prompt_length",
    "data.max_response_length": "rollout.response_length",
}


@dataclass
class Generation:
    """Everything that the run needs; all that may be None is so if the file is finished already."""

    config: GenerationConfig
    dataset: RLHFDataset
    columns: pa.Table  # of the questions, in the dataset's order
    file: PartedFile
    lock: RunLock | None = None
    workers: WorkerGroup | None = None
    rollout: Rollout | None = None

    def __call__(self) -> None:
        """Sample the parts that are missing, and join all."""
        if self.file.finished:
            print(f"{self.file.path} is finished already")
            self.file.remove_parts()
            return
        self.file.begin()
        missing = self.file.missing()
        size, total, there = self.config.data.batch_size, len(self.dataset), self.file.n_parts - len(missing)
        print(
            f"model: {self.file.settings['model.path']} ({self.config.rollout.name})\n"
            f"{total} questions x {self.config.data.n_samples} responses, in {self.file.n_parts} parts"
            + (f"; {there} of them are there already" if there else ""),
            flush=True,
        )
        if missing:
            self._start()
        started = time.perf_counter()
        for done, part in enumerate(missing, start=1):
            begun = time.perf_counter()
            indices = range(part * size, min((part + 1) * size, total))
            table = self._sample(indices, Progress(f"part {part + 1}/{self.file.n_parts}"))
            self.file.write(part, table)
            now = time.perf_counter()
            line = f"part {part + 1}/{self.file.n_parts}: {describe(table, now - begun)}"
            if done < len(missing):
                line += f", {duration((now - started) / done * (len(missing) - done))} left"
            print(line, flush=True)
        self.file.finish()
        print(
            f"responses: {self.file.path}\nto score them: python -m verl.trainer.main_eval data.path={self.file.path}"
        )

    def _start(self) -> None:
        assert self.workers is not None and self.rollout is not None
        self.workers.init_model()
        self.rollout.start()
        self.stop_token_ids = self.workers.stop_token_ids()

    def _sample(self, indices: range, progress: OnFinished) -> pa.Table:
        """The questions at `indices` with their responses."""
        assert self.rollout is not None
        rollout, n = self.config.rollout, self.config.data.n_samples
        params = SamplingParams(
            rollout.response_length, rollout.temperature, rollout.top_p, rollout.top_k, greedy=rollout.temperature == 0
        )
        batch, texts, _ = sample_to_measure(
            self.rollout, self.dataset, indices, n, params, self.config.trainer.seed, 0, progress
        )
        lengths = batch["response_mask"].sum(1)  # (N,)
        columns = (texts, lengths.tolist(), self._finished(batch, lengths))
        types = (pa.string(), pa.int32(), pa.bool_())
        table = self.columns.slice(indices.start, len(indices))
        for name, values, kind in zip(NEW_COLUMNS, columns, types, strict=True):
            nested = [values[start : start + n] for start in range(0, len(values), n)]
            table = table.append_column(name, pa.array(nested, pa.list_(kind)))
        return table

    def _finished(self, batch: DataProto, lengths: Any) -> list[bool]:
        """Which responses ended by themselves, rather than at the longest length."""
        last = batch["responses"].gather(1, lengths[:, None] - 1)[:, 0].tolist()
        return [token in self.stop_token_ids for token in last]

    def shutdown(self) -> None:
        if self.rollout is not None:
            self.rollout.shutdown()
        if self.workers is not None:
            self.workers.shutdown()
        if self.lock is not None:
            self.lock.release()


class Progress:
    """Tells once a minute how many responses of a part are finished."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.finished = 0
        self.told = time.monotonic()

    def __call__(self, rows: np.ndarray, output: GenerationOutput) -> None:
        self.finished += len(rows)
        if time.monotonic() - self.told > PROGRESS_S and self.finished < len(output.lengths):
            self.told = time.monotonic()
            print(f"{self.label}: {self.finished} of {len(output.lengths)} responses", flush=True)


def describe(table: pa.Table, seconds: float) -> str:
    lengths = table["response_lengths"].combine_chunks().flatten().to_numpy()
    finished = table["finished"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return (
        f"{len(lengths)} responses of {lengths.mean():.0f} tokens, {100 * finished.mean():.1f} % finished, "
        f"{seconds:.1f} s, {lengths.sum() / seconds:.0f} tokens/s"
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# -------------------------------------------------------------------------------------------------------- building
def build(config: GenerationConfig) -> Generation:
    """Everything up to the first response, cheap checks first. Raises ValueError for what the user can mend."""
    check(config)
    model_path = find_model(config.model.path)
    tokenizer = load_tokenizer(model_path, "model.path")
    data = DataConfig(max_prompt_length=UNLIMITED, prompt_key=config.data.prompt_key)
    dataset = RLHFDataset(config.data.path, tokenizer, data, "data.path")
    longest = check_prompt_lengths(dataset, config.rollout.prompt_length)
    file = PartedFile(
        Path(config.data.output_path),
        settings(config, model_path, dataset),
        n_parts=-(-len(dataset) // config.data.batch_size),
    )
    job = Generation(config, dataset, join_columns(dataset), file)
    if file.finished:
        return job
    training = as_training_config(config, model_path, longest)
    try:
        check_context_length(training, model_path)
        if config.rollout.name == "vllm":
            check_vllm(training, cluster_device(training))
    except ValueError as error:
        raise ValueError(in_own_terms(str(error))) from error
    # Beside the parts' folder, which is deleted while the lock is held.
    lock = file.path.with_name(f".{file.path.name}{LOCK}")
    job.lock = RunLock(lock, f"data.output_path={file.path}", "name another data.output_path")
    try:
        job.workers = create_worker_group(
            config.trainer, GenerationWorker, model_path, config.rollout.name, config.rollout.max_num_seqs
        )
        if config.rollout.name == "hf":
            job.rollout = WorkerRollout(job.workers, log_probs=False)
        else:
            job.rollout = EngineRollout(training, job.workers, tokenizer.pad_token_id)
    except BaseException:
        job.shutdown()
        raise
    return job


def check(config: GenerationConfig) -> None:
    data, rollout = config.data, config.rollout
    if Path(data.output_path).suffix != ".parquet":
        raise ValueError(f"data.output_path={data.output_path}: name a file that ends in .parquet, as main_eval reads")
    if rollout.name not in ("hf", "vllm"):
        raise ValueError(f"rollout.name={rollout.name}: use one of hf, vllm")
    for key, value in (
        ("data.n_samples", data.n_samples),
        ("data.batch_size", data.batch_size),
        ("rollout.response_length", rollout.response_length),
        ("rollout.max_num_seqs", rollout.max_num_seqs),
        ("rollout.engine_timeout_s", rollout.engine_timeout_s),
    ):
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    if rollout.temperature < 0:
        raise ValueError(f"rollout.temperature={rollout.temperature} must be 0 (greedy) or more")
    check_truncated_sampling("rollout", rollout)
    if rollout.temperature == 0 and data.n_samples > 1:
        raise ValueError(
            f"data.n_samples={data.n_samples} greedy responses are all the same: set rollout.temperature above 0, or "
            "data.n_samples=1"
        )


def find_model(path: str) -> str:
    """The Hugging Face folder (absolute) or hub name that `model.path` stands for. A checkpoint's is read in full once,
    so that no damaged weights are evaluated."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    try:
        checkpoint = find_checkpoint(folder)
    except ValueError as error:
        raise ValueError(f"model.path={path} is no Hugging Face folder either: {error}") from error
    try:
        exported = [name for name in read_manifest(checkpoint) if name.startswith("huggingface/")]
    except ValueError as error:
        raise ValueError(f"model.path={path}: {checkpoint} is not a complete checkpoint: {error}") from error
    if (fault := find_fault(checkpoint, exported, exported)) is not None:
        raise ValueError(f"model.path={path}: {checkpoint} is damaged: {fault}; name another checkpoint")
    return str((checkpoint / "huggingface").resolve())


def check_prompt_lengths(dataset: RLHFDataset, limit: int | None) -> int:
    """The longest prompt that there may be, in tokens: `rollout.prompt_length`, or the longest of the data."""
    lengths = [len(dataset[i]["prompt_ids"]) for i in range(len(dataset))]
    if limit is None:
        return max(lengths)
    for index, length in enumerate(lengths):
        if length > limit:
            raise ValueError(
                f"{dataset.place(index)}: the prompt has {length} tokens, rollout.prompt_length is {limit}: raise it, "
                "or leave it out"
            )
    return limit


def join_columns(dataset: RLHFDataset) -> pa.Table:
    """The columns of all files below each other; what a file does not have is null there."""
    for file in dataset.files:
        for name in NEW_COLUMNS:
            if name in file.rows.column_names:
                raise ValueError(f"data.path: {file.path} has a column {name!r} already: rename it")
    try:
        return pa.concat_tables([file.rows.data.table for file in dataset.files], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise ValueError(f"data.path: the files have columns of different types, sample each apart: {error}") from error


def settings(config: GenerationConfig, model_path: str, dataset: RLHFDataset) -> dict[str, Any]:
    """What decides which responses come out, by configuration key."""
    model = Path(model_path)
    stats = [(path.name, path.stat()) for path in sorted(model.iterdir())] if model.is_dir() else []
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    rollout = config.rollout
    return {
        "model.path": model_path,
        "model.path's files (checksum)": zlib.crc32(str(files).encode()),
        "data.path": [f"{file.path.name} (checksum {file_crc32(file.path)})" for file in dataset.files],
        "data.prompt_key": config.data.prompt_key,
        "data.n_samples": config.data.n_samples,
        "data.batch_size": config.data.batch_size,
        "rollout.name": rollout.name,
        "rollout.temperature": rollout.temperature,
        "rollout.top_p": rollout.top_p,
        "rollout.top_k": rollout.top_k,
        "rollout.response_length": rollout.response_length,
        "trainer.seed": config.trainer.seed,
    }


def as_training_config(config: GenerationConfig, model_path: str, prompt_length: int) -> PPOConfig:
    """The same in the training's configuration, which the engines and their checks read."""
    rollout, trainer = config.rollout, config.trainer
    training = PPOConfig(
        data=DataConfig(
            train_files=config.data.path,
            val_files=config.data.path,
            max_prompt_length=prompt_length,
            max_response_length=rollout.response_length,
        ),
        actor_rollout_ref=ActorRolloutRefConfig(
            model=ModelConfig(path=model_path),
            rollout=RolloutConfig(
                name=rollout.name,
                max_num_seqs=rollout.max_num_seqs,
                max_num_batched_tokens=rollout.max_num_batched_tokens,
                tensor_model_parallel_size=rollout.tensor_model_parallel_size,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                kv_cache_memory_bytes=rollout.kv_cache_memory_bytes,
                enforce_eager=rollout.enforce_eager,
                engine_timeout_s=rollout.engine_timeout_s,
                free_cache_engine=False,  # nothing is trained between two batches
                calculate_log_probs=False,
            ),
        ),
        trainer=TrainerConfig(
            nnodes=trainer.nnodes,
            n_gpus_per_node=trainer.n_gpus_per_node,
            device=trainer.device,
            worker_group=trainer.worker_group,
            start_timeout_s=trainer.start_timeout_s,
            seed=trainer.seed,
        ),
    )
    resolved: Any = OmegaConf.to_object(OmegaConf.structured(training))  # keys that follow others
    return resolved


def in_own_terms(message: str) -> str:
    for theirs, ours in TERMS.items():
        message = message.replace(theirs, ours)
    return message


def run(job: Generation) -> None:
    try:
        job()
    except EngineError as error:
        raise EngineError(in_own_terms(str(error))) from error
    finally:
        job.shutdown()


def where_stopped(job: Generation) -> str:
    return f"interrupted; started again, it goes on after the last part of {job.file.path}"


if __name__ == "__main__":
    sys.exit(run_cli(build, run, GenerationConfig, "generation", interrupted=where_stopped))
