"""One way to train: SASRec, the Thought Space and the ranker run the same loop under Ray Train and DeepSpeed.

A model brings a `Task`: its module, the losses of some examples, a validation, and how it is saved. The loop owns the
DeepSpeed dictionary, the order of examples, checkpoints, resumption, early stopping and progress.

**Order.** The order of examples is a function of seed and epoch, and torch's generator is set from seed, step and rank
before each step. So a run that was killed goes on from its last checkpoint exactly as it would have gone on.

**Weights of examples.** `Task.losses` gives one loss per example; a step's loss is their mean over the whole batch,
however it is cut among workers and micro-batches.

**Validation.** It takes place in the workers, between two steps, or, where `async_validation` is set, in a task of its
own on the checkpoint, while training goes on. Each evaluation then waits for the result of the one before, so that
what comes out does not depend on how long a validation took.

**Resumption.** Ray Train finds the checkpoints of a run by its name; the newest that is whole is taken. On the same
number of workers DeepSpeed's own state is loaded; on another number (which DeepSpeed refuses) the weights and the step
are, and the optimizer's moments start anew.

**Memory.** Where a pass does not fit, the workers are started again from the newest checkpoint with passes of half as
many examples, of which more make up a step. That changes no gradient, only the draws of dropout and of negatives. A
task whose losses need the whole batch (`Task.divisible`) ends with an error instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import ValidationConfig
from ray.train.torch import TorchConfig, TorchTrainer
from tensorboardX import SummaryWriter

from pulse_ray import runtime
from pulse_ray.config import TrainingConfig
from pulse_ray.errors import PulseError, TrainingError
from pulse_ray.progress import LOG_INTERVAL_S, Bar, ReportGuard, console
from pulse_ray.training import board, checkpoints
from pulse_ray.training.board import News
from pulse_ray.training.task import Task
from pulse_ray.training.worker import UNKNOWN_SCORE, Job, validate_checkpoint, work
from pulse_ray.workspace import Artefact

BOARD = "tensorboard"
"""Folder of a model's curves."""

UPLOAD_S = 30.0
"""Between two uploads of the curves."""

MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Lets glibc keep the memory of a step for the next one, which the kernel would have to clear each time."""

THREADS = {"GOMP_SPINCOUNT": "3000000"}
"""Of workers that have the cores to themselves: a thread that sleeps between two products is late for the second."""

KEPT = 2
"""Checkpoints that are kept beside the newest, the best ones: one may turn out to be damaged."""


def fit(
    build: Callable[..., Task],
    *args: Any,
    config: TrainingConfig,
    seed: int,
    output: Artefact,
    folder: str,
    title: str,
    log_interval_s: float = LOG_INTERVAL_S,
    upload_interval_s: float = UPLOAD_S,
) -> dict[str, Any]:
    """Trains a model and leaves its best weights and `training.json` in `output/folder`.

    A model that is there already is not trained again; a run that was interrupted goes on from its last checkpoint.

    Args:
        build: makes the task; called with `*args` in every worker.
        output: the artefact; checkpoints live below it until training has ended.
        folder: the model's folder in the artefact, "" for the artefact itself.
        title: what the progress line says.
        log_interval_s: seconds between two lines of progress where standard error is not a terminal.
        upload_interval_s: seconds between two uploads of the curves; 0 uploads after every step that has figures.

    Returns:
        The content of `training.json`: `monitor`, `steps`, `evaluations`, `best_step`, `best`.

    Raises:
        TrainingError: a loss is not finite, or the workers failed more often than allowed.
        PulseError: as raised by the task.
    """
    target = Artefact(output.filesystem, f"{output.path}/{folder}".rstrip("/"), output.name)
    kept = Artefact(output.filesystem, f"{target.path}/checkpoints", "checkpoints")
    if (known := target.read_bytes("training.json")) is not None:
        kept.delete()  # The run may have been killed just before it did so.
        return dict(json.loads(known))
    job = Job(build=build, args=args, config=config, seed=seed, board=board.hang_up())
    with Bar(title, None, "steps", log_interval_s) as bar, _Curves(target, upload_interval_s) as curves:
        result = _run(job, kept, bar, curves)
    with result.checkpoint.as_directory() as local:
        state = checkpoints.State.read(Path(local))
        monitor = json.loads((Path(local) / checkpoints.MONITOR).read_text())
    with _best(result, state.best_step) as best:
        target.upload(best / checkpoints.WEIGHTS)
    record = {
        "monitor": monitor,
        "steps": state.steps,
        "evaluations": state.evaluations,
        "best_step": state.best_step,
        "best": state.best,
    }
    target.write_bytes("training.json", json.dumps(record).encode())
    kept.delete()
    return record


def _run(job: Job, kept: Artefact, bar: Bar, curves: _Curves) -> ray.train.Result:
    """Trains to the end, with smaller passes as often as they do not fit into memory."""
    while True:
        limit = ray.get(job.board.limit.remote())
        outcome = _watched(_trainer(job, kept), job.board, bar, curves)
        stopped = ray.get(job.board.stopped.remote())
        fits = ray.get(job.board.limit.remote()) == limit
        error = outcome if isinstance(outcome, BaseException) else outcome.error
        if error is None and stopped is None:
            ray.kill(job.board)
            assert isinstance(outcome, ray.train.Result)
            return outcome
        if stopped is not None or fits or isinstance(error, KeyboardInterrupt):
            ray.kill(job.board)
            raise stopped or _explain(error) from error


def _trainer(job: Job, kept: Artefact) -> TorchTrainer:
    workers = job.config.workers
    return TorchTrainer(
        work,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, "GPU": workers.gpus},
        ),
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=kept.path,
            storage_filesystem=kept.filesystem,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=KEPT, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            worker_runtime_env={"env_vars": environment(job.config)},
        ),
        validation_config=ValidationConfig(
            partial(validate_checkpoint, build=job.build, args=job.args),
            # The workers hold their CPUs while they wait for it.
            ray_remote_kwargs={"num_cpus": 0, "num_gpus": workers.gpus},
        )
        if job.config.async_validation
        else None,
    )


def environment(config: TrainingConfig) -> dict[str, str]:
    """Variables of the workers' processes. What the driver's environment sets otherwise than we did stays as it is."""
    if config.workers.gpus:
        return {}
    wanted = MEMORY if config.async_validation else MEMORY | THREADS
    ours = runtime.WORKER_ENVIRONMENT
    return {name: value for name, value in wanted.items() if os.environ.get(name) in (None, ours.get(name))}


def _watched(trainer: TorchTrainer, told_on: Any, bar: Bar, curves: _Curves) -> ray.train.Result | BaseException:
    """Runs the trainer beside a progress line, in a thread so that Ctrl-C reaches us and not Ray's own handler."""
    outcome: list[ray.train.Result | BaseException] = []

    def run() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)

    thread, guard = threading.Thread(target=run, daemon=True), ReportGuard(bar.title)

    def show() -> None:
        told, notices = ray.get(told_on.take.remote())
        for notice in notices:
            console.print(notice, markup=False, highlight=False)
        for news in told:
            curves.add(news)
            bar.total = news.total
            if not bar.done:
                bar.skip(news.step - 1)  # A run that is resumed.
            shown = {
                name: f"{value:.4g}" for name, value in news.figures.items() if "/" not in name or name == "tokens/s"
            }
            bar.advance(news.step - bar.done, shown or None)

    thread.start()
    while thread.is_alive():
        thread.join(timeout=1.0)
        guard.run(show)
    guard.run(show)  # The last steps may have ended during an upload of the curves.
    return outcome[0]


class _Curves:
    """Writes a run's curves for TensorBoard into the model's folder, which may be anywhere.

    An upload that fails is logged, and training continues: the next one carries the same points.
    """

    def __init__(self, target: Artefact, upload_interval_s: float) -> None:
        self._target = Artefact(target.filesystem, f"{target.path}/{BOARD}", target.name)
        self._writer: SummaryWriter | None = None
        self._upload_interval_s, self._guard = upload_interval_s, ReportGuard(f"curves in {self._target.path}")
        self._uploaded, self._newest = 0.0, 0

    def __enter__(self) -> _Curves:
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_: object) -> None:
        with self._folder:
            if self._writer is not None:
                self._writer.close()
                self._guard.run(self._upload)

    def add(self, news: News) -> None:
        """Adds the points of a step. What an earlier try plotted of later ones is hidden."""
        if self._writer is None or news.step < self._newest:
            if self._writer is not None:
                self._writer.close()
            self._writer = SummaryWriter(self._folder.name, purge_step=news.step)
        self._newest = news.step
        for name, value in news.figures.items():
            self._writer.add_scalar(name if "validation" in name else f"training/{name}", value, news.step)
        if time.monotonic() - self._uploaded >= self._upload_interval_s:
            self._writer.flush()
            self._guard.run(self._upload)
            self._uploaded = time.monotonic()

    def _upload(self) -> None:
        self._target.upload(Path(self._folder.name))


@contextlib.contextmanager
def _best(result: ray.train.Result, step: int) -> Iterator[Path]:
    """The folder of the best step's checkpoint; one that was damaged was trained again, and is there twice."""
    with contextlib.ExitStack() as stack:
        damaged: TrainingError | None = None
        for checkpoint, told in result.best_checkpoints:
            if told["step"] != step or told["score"] == UNKNOWN_SCORE:  # The last one may hold no weights.
                continue
            try:
                folder = stack.enter_context(checkpoints.opened(checkpoint))
            except TrainingError as error:
                damaged = damaged or error
                continue
            yield folder
            return
        assert damaged is not None
        raise damaged


def _explain(error: BaseException | None) -> BaseException:
    """The error of ours that made a run fail, where there is one."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in [*failures.values(), error]:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, PulseError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(error, KeyboardInterrupt):
        return error
    lines = str(next(iter(failures.values()), error)).strip().splitlines()
    return TrainingError(
        f"training workers failed: {lines[-1] if lines else type(error).__name__}",
        remedy="Run the same command again to go on from the last checkpoint; Ray's logs hold the workers' tracebacks",
    )


def best_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics of the checkpoint that was kept."""
    return next(dict(entry) for entry in record["evaluations"] if entry["step"] == record["best_step"])
