"""`python -m verl.trainer.main_eval data.path=...`: score what `main_generation` wrote; a table and JSON."""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from verl.protocol import DataProto, object_array
from verl.trainer.cli import run_cli
from verl.trainer.config.evaluation_schema import EvalConfig
from verl.trainer.evaluation.parts import parts_folder, read_settings, write_durably
from verl.trainer.evaluation.report import Report, SourceReport
from verl.trainer.evaluation.statistics import Bootstrapped, Measures, measures_by_group
from verl.trainer.ppo.registry import get_reward_manager
from verl.trainer.ppo.reward import RewardManager, load_reward, make_reward_manager
from verl.utils import reward_score
from verl.utils.dataset.rows import RowFile, read_files
from verl.utils.random import generator
from verl.workers.reward.function import RewardFunction
from verl.workers.reward.outcomes import FAILURES

COLUMNS = ["data_source", "reward_model", "responses", "response_lengths", "finished"]
CALLS = 1024  # responses handed to the scoring processes together,
PART_BYTES = 1 << 26  # or fewer, if the rows that hold them have more: some ground truths have megabytes
WAITING = 16  # of those parts at a time, so that one that waits for a stuck call keeps no other from its turn


@dataclass
class Scores:
    """Of the N responses to the questions of one data source."""

    question_ids: list[str] = field(default_factory=list)
    levels: list[str] = field(default_factory=list)
    acc: list[float] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    failures: Counter = field(default_factory=Counter)

    def add(self, others: "Scores") -> None:
        self.failures.update(others.failures)
        for name in ("question_ids", "levels", "acc", "answers", "lengths", "finished"):
            getattr(self, name).extend(getattr(others, name))


class Evaluation:
    def __init__(self, config: EvalConfig, files: list[RowFile], reward: RewardManager, output: Path) -> None:
        self.config = config
        self.reward = reward
        self.output = output
        self.settings = {str(file.path): read_settings(file.path) for file in files}
        self.files = files
        self.places: dict[str, list[tuple[int, int]]] = {}  # by data source: (file, row) of its questions
        for number, file in enumerate(files):
            for index, source in enumerate(file.rows["data_source"]):
                self.places.setdefault(source, []).append((number, index))

    def __call__(self) -> Report:
        """Score all responses; write the report and print it."""
        scores = {source: self._score(source, places) for source, places in self.places.items()}
        report = self._report(scores)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n"
        write_durably(self.output, lambda path: path.write_text(text, encoding="utf-8"))
        report.print()
        print(f"with every interval: {self.output}")
        return report

    def _score(self, source: str, places: list[tuple[int, int]]) -> Scores:
        scores = Scores()
        console = Console(stderr=True)
        parts = self._parts(places)
        with ThreadPoolExecutor(WAITING if self.config.reward_model.num_workers else 1) as threads:
            scored = threads.map(self._score_part, parts)
            for part in track(scored, source, len(parts), console=console, disable=not console.is_terminal):
                scores.add(part)
        return scores

    def _parts(self, places: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """What is scored together: questions with up to CALLS responses and PART_BYTES, at least one."""
        n = len(self._row(places[0])["responses"])
        parts: list[list[tuple[int, int]]] = []
        room = 0
        for file, row in places:
            size = self.files[file].rows.data.table.slice(row, 1).nbytes
            if size > room or (len(parts[-1]) + 1) * n > CALLS:
                parts.append([])
                room = PART_BYTES
            parts[-1].append((file, row))
            room -= size
        return parts

    def _score_part(self, places: list[tuple[int, int]]) -> Scores:
        rows = {f"{file}:{row}": self._row((file, row)) for file, row in places}
        batch, texts = as_batch(rows)
        _, extras, metrics = self.reward(batch, texts)
        return Scores(
            batch["question_id"].tolist(),
            batch["level"].tolist(),
            extras["acc"].tolist(),
            extras["pred"].tolist(),
            [length for row in rows.values() for length in row["response_lengths"]],
            [finished for row in rows.values() for finished in row["finished"]],
            Counter({kind: int(metrics[f"reward/{kind}"]) for kind in FAILURES}),
        )

    def _row(self, place: tuple[int, int]) -> dict[str, Any]:
        file, row = place
        return self.files[file].rows[row]

    def _report(self, scores: dict[str, Scores]) -> Report:
        bootstrap = self.config.bootstrap
        sources, totals = {}, []
        for source, found in scores.items():
            resampled, questions = {}, {}
            for level, measures in measures_by_level(source, found).items():
                rng = generator(bootstrap.seed, source, level)
                resampled[level] = Bootstrapped.of(measures, bootstrap.samples, rng)
                questions[level] = len(next(iter(measures.values())))
            totals.append(resampled[""])
            sources[source] = SourceReport(
                questions=questions[""],
                n=len(found.acc) // questions[""],
                measures=resampled[""].estimates(),
                levels={level: (questions[level], part.estimates()) for level, part in resampled.items() if level},
                failures=dict(found.failures),
                finished=float(np.mean(found.finished)),
                response_length=float(np.mean(found.lengths)),
            )
        average = Bootstrapped.average(totals).estimates() if len(totals) > 1 else None
        return Report(sources, average, {"samples": bootstrap.samples, "seed": bootstrap.seed}, self.settings)


def measures_by_level(source: str, scores: Scores) -> dict[str, Measures]:
    """Measures of all questions, under "", and of each level. There is no maj@n where responses are right but none has
    an answer to vote on, as programs have none."""
    sources = [source] * len(scores.acc)
    groups = measures_by_group(sources, scores.question_ids, scores.levels, scores.acc, scores.answers)
    voted = any(answer is not None for answer in scores.answers) or not any(scores.acc)
    return {
        level: {name: values for name, values in measures.items() if voted or not name.startswith("maj@")}
        for (_, level), measures in groups.items()
    }


def as_batch(rows: dict[str, dict[str, Any]]) -> tuple[DataProto, list[str]]:
    """The responses to these questions, by id, as rows that can be scored, and their texts."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("data_source", "ground_truth", "extra_info", "question_id", "level")
    }
    texts: list[str] = []
    for question_id, row in rows.items():
        extra_info = row.get("extra_info") or {}
        level = extra_info.get("level")
        values = (
            row["data_source"],
            row["reward_model"]["ground_truth"],
            extra_info,
            question_id,
            "" if level is None else str(level),
        )
        for column, value in zip(columns.values(), values, strict=True):
            column += [value] * len(row["responses"])
        texts += row["responses"]
    arrays = {name: object_array(values) for name, values in columns.items()}
    # Scores go to the last token of a response; here each has one.
    mask = torch.ones(len(texts), 1, dtype=torch.bool)
    return DataProto.from_dict({**arrays, "response_mask": mask}), texts


# -------------------------------------------------------------------------------------------------------- building
def build(config: EvalConfig) -> Evaluation:
    """Everything up to the first score. Raises ValueError for what the user can mend."""
    manager = config.reward_model.reward_manager
    if get_reward_manager(manager).shapes_overlong:
        raise ValueError(
            f"reward_model.reward_manager={manager} shapes what is trained on; here scores are measured as they are: "
            "leave it out"
        )
    if config.bootstrap.samples < 1:
        raise ValueError(f"bootstrap.samples={config.bootstrap.samples} must be at least 1")
    paths = [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)
    for path in paths:
        if not Path(path).is_file() and parts_folder(Path(path)).is_dir():
            raise ValueError(f"data.path: {path} is not finished: start its main_generation again, it goes on")
    files = read_files(paths, "data.path", COLUMNS)
    function = load_reward(config)
    for file in files:
        check_rows(file, function)
    output = Path(config.data.output_path or Path(paths[0]).with_suffix(".json"))
    return Evaluation(config, files, make_reward_manager(function, config.reward_model), output)


def check_rows(file: RowFile, function: RewardFunction) -> None:
    """ValueError for a data source without a scorer, and for rows that differ in their number of responses."""
    counts: dict[str, int] = {}
    for row, (source, responses) in enumerate(zip(file.rows["data_source"], file.rows["responses"], strict=True)):
        if source not in counts and function.path is None:
            try:
                reward_score.check_data_source(source)
            except ValueError as error:
                raise file.error(row, "data_source", str(error)) from error
        if len(responses) != counts.setdefault(source, len(responses)) or not responses:
            raise file.error(row, "responses", f"{len(responses)} responses, earlier questions have {counts[source]}")


def run(evaluation: Evaluation) -> None:
    try:
        evaluation()
    finally:
        evaluation.reward.close()


if __name__ == "__main__":
    sys.exit(run_cli(build, run, EvalConfig, "evaluation"))
