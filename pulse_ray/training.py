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

**Resumption.** Ray Train finds the newest checkpoint of a run by its name. On the same number of workers DeepSpeed's
own state is loaded; on another number (which DeepSpeed refuses) the weights and the step are, and the optimizer's
moments start anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import ray.train
import torch
from ray.train import CheckpointUploadMode, ReportedCheckpointStatus, ValidationConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file, save_file
from torch import nn

from pulse_ray.config import TrainingConfig
from pulse_ray.errors import PulseError, TrainingError
from pulse_ray.progress import Bar
from pulse_ray.seeding import derive
from pulse_ray.workspace import Artefact

UNKNOWN_SCORE = -1e30
"""Of a checkpoint that is not validated yet, or holds no weights: worse than any."""

LOSS_POINTS = 200
"""Points of the loss curve that are kept, at most."""


class Task(Protocol):
    """What a model brings to training. Built anew in every worker."""

    monitor: str
    """Name of the metric of `validate` that picks the best checkpoint."""
    higher_is_better: bool
    """Direction of `monitor`."""
    validate_first: bool
    """Whether to validate before the first step as well, for a curve that shows what training changed."""

    def module(self) -> nn.Module:
        """The module to train, in the precision that it is trained in. Frozen parameters require no gradient."""
        ...

    def __len__(self) -> int:
        """Number of training examples."""
        ...

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        """The loss of each of the training examples `indices`: [len(indices)], computed by calling `engine`."""
        ...

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        """Sum and count of each metric over this worker's share of the validation examples."""
        ...

    def save(self, module: nn.Module, folder: Path) -> None:
        """Writes what inference needs, as safetensors and JSON."""
        ...

    def names(self, indices: Sequence[int]) -> list[str]:
        """Ids of training examples, for error messages."""
        ...


@dataclass(kw_only=True)
class _State:
    """Where a run is. Stored in every checkpoint as JSON."""

    step: int = 0
    world: int = 1
    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    done: bool = False
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes that follow from the number of examples, the workers and the configuration."""

    examples: int
    world: int
    config: TrainingConfig

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last batch may be smaller."""
        return math.ceil(self.examples / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, were it not stopped early."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def accumulation(self) -> int:
        """Forward passes of a worker in one optimizer step."""
        share = math.ceil(self.config.batch_size / self.world)
        return math.ceil(share / min(share, self.config.micro_batch_size or share))

    @property
    def evaluation_interval(self) -> int:
        """Optimizer steps between validations."""
        return max(1, round(self.steps_per_epoch / self.config.evaluations_per_epoch))

    def batch(self, seed: int, step: int) -> np.ndarray:
        """Indices of the examples in optimizer step `step`: [at most batch_size]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng(derive(seed, "order", epoch)).permutation(self.examples)
        size = self.config.batch_size
        return order[place * size : (place + 1) * size]

    def micro_batches(self, batch: np.ndarray, rank: int) -> list[np.ndarray]:
        """A worker's share of a batch, in as many pieces for every worker; pieces may be empty."""
        return np.array_split(batch[rank :: self.world], self.accumulation)

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then cosine decay to zero."""
        warmup = max(1, round(self.config.warmup_fraction * self.total_steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, self.total_steps - warmup))))


def fit(
    build: Callable[..., Task],
    *args: Any,
    config: TrainingConfig,
    seed: int,
    output: Artefact,
    folder: str,
    title: str,
) -> dict[str, Any]:
    """Trains a model and leaves its best weights and `training.json` in `output/folder`.

    A model that is there already is not trained again; a run that was interrupted goes on from its last checkpoint.

    Args:
        build: makes the task; called with `*args` in every worker.
        output: the artefact; checkpoints live below it until training has ended.
        folder: the model's folder in the artefact, "" for the artefact itself.
        title: what the progress line says.

    Returns:
        The content of `training.json`: `monitor`, `steps`, `evaluations`, `best_step`, `best`.

    Raises:
        TrainingError: a loss is not finite, or the workers failed more often than allowed.
        PulseError: as raised by the task.
    """
    prefix = f"{folder}/" if folder else ""
    checkpoints = Artefact(output.filesystem, f"{output.path}/{prefix}checkpoints", "checkpoints")
    if (known := output.read_bytes(f"{prefix}training.json")) is not None:
        checkpoints.delete()  # The run may have been killed just before it did so.
        return dict(json.loads(known))
    trainer = TorchTrainer(
        _work,
        train_loop_config={"build": build, "args": args, "config": config, "seed": seed, "board": None},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers.count,
            use_gpu=config.workers.gpus > 0,
            resources_per_worker={"CPU": config.workers.cpus, "GPU": config.workers.gpus},
        ),
        torch_config=TorchConfig(backend="nccl" if config.workers.gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=checkpoints.path,
            storage_filesystem=checkpoints.filesystem,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
            failure_config=ray.train.FailureConfig(max_failures=config.workers.max_failures),
        ),
        validation_config=ValidationConfig(
            partial(_validate_checkpoint, build=build, args=args),
            # The workers hold their CPUs while they wait for it.
            ray_remote_kwargs={"num_cpus": 0, "num_gpus": config.workers.gpus},
        )
        if config.async_validation
        else None,
    )
    result = _watch(trainer, title)
    record = _record(result.checkpoint)
    best = max(result.best_checkpoints, key=lambda kept: kept[1]["score"])[0]
    with best.as_directory() as local:
        target = Artefact(output.filesystem, f"{output.path}/{folder}".rstrip("/"), output.name)
        target.upload(Path(local) / "weights")
    output.write_bytes(f"{prefix}training.json", json.dumps(record).encode())
    checkpoints.delete()
    return record


def _watch(trainer: TorchTrainer, title: str) -> ray.train.Result:
    """Runs the trainer beside a progress line, in a thread so that Ctrl-C reaches us and not Ray's own handler."""
    # On this node: it must not be lost with another one.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = _Board.options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    trainer.train_loop_config["board"] = board
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with Bar(title, None, "steps") as bar:
        while thread.is_alive():
            thread.join(timeout=1.0)
            for news in ray.get(board.take.remote()):
                bar.total, step = news.pop("total"), news.pop("step")
                if not bar.done:
                    bar.skip(step - 1)  # A run that is resumed.
                bar.advance(step - bar.done, {name: f"{value:.4g}" for name, value in news.items()})
    ray.kill(board)
    if error := outcome.get("error"):
        raise _explain(error) from error
    result: ray.train.Result = outcome["result"]
    if result.error is not None:
        raise _explain(result.error) from result.error
    return result


def _explain(error: BaseException) -> BaseException:
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


def _record(checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as local:
        state = json.loads((Path(local) / "state.json").read_text())
        monitor = json.loads((Path(local) / "monitor.json").read_text())
    return {
        "monitor": monitor,
        "steps": state["steps"],
        "evaluations": state["evaluations"],
        "best_step": state["best_step"],
        "best": state["best"],
    }


@ray.remote
class _Board:
    """Carries progress from the first worker to the driver."""

    def __init__(self) -> None:
        self.news: list[dict[str, float]] = []

    def put(self, news: dict[str, float]) -> None:
        self.news.append(news)

    def take(self) -> list[dict[str, float]]:
        news, self.news = self.news, []
        return news


def _work(settings: dict[str, Any]) -> None:
    """What every worker runs."""
    config: TrainingConfig = settings["config"]
    seed: int = settings["seed"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(config.workers.threads or max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(derive(seed, "weights"))
    task: Task = settings["build"](*settings["args"])
    plan = Plan(examples=len(task), world=world, config=config)
    if plan.examples == 0:
        raise TrainingError("there are no training examples", remedy="Lower prepare.min_user_interactions, or add data")
    with _opened(ray.train.get_checkpoint()) as checkpoint:
        if checkpoint and json.loads((checkpoint / "state.json").read_text())["done"]:
            return  # Its driver was killed before it could take the result.
        engine, scheduler = _engine(task.module(), plan, checkpoint)
        state = _resume(engine, scheduler, checkpoint, world)
    if config.async_validation and state.step:
        _settle(task, plan, state, rank)
    if task.validate_first and state.step == 0:
        state.evaluations.append({"step": 0, "epoch": 0.0, **_validate(engine, task, plan, rank)})
    while not state.done:
        loss, lr, norm = _step(engine, scheduler, task, plan, seed, state.step, rank)
        state.step += 1
        if state.step % math.ceil(plan.total_steps / LOSS_POINTS) == 0:
            state.steps.append({"step": state.step, "loss": loss, "lr": lr})
        if rank == 0:
            news = {"step": state.step, "total": plan.total_steps, "loss": loss, "lr": lr, "grad": norm}
            settings["board"].put.remote(news)
        last = state.step == plan.total_steps
        if state.step % plan.evaluation_interval == 0 or last:
            if config.async_validation:
                _evaluate_beside(engine, task, plan, state, rank)
                continue
            _note(task, plan, state, state.step, _validate(engine, task, plan, rank))
            state.done = last or state.since_best >= config.patience
            _report(engine, task, state, rank, {"score": _score(task, state.evaluations[-1]), "step": state.step})


def _engine(module: nn.Module, plan: Plan, checkpoint: Path | None) -> tuple[Any, Any]:
    """A DeepSpeed engine around `module`, with the checkpoint's trainable weights where there is one."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if plan.world == 1:
        # On CPU DeepSpeed compiles its all-reduce over shared memory, for a minute; a single worker has no use for it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if checkpoint:
        # Before the engine exists: it copies the weights into its own master weights when it is built.
        missing = module.load_state_dict(load_file(checkpoint / "trainable.safetensors"), strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
    config = plan.config
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": params, "weight_decay": config.weight_decay if decays else 0.0}
            for decays, params in groups.items()
            if params
        ],
        lr=config.lr,
        fused=True,  # Or each step would go over the weights many times.
    )
    engine, _, _, scheduler = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=lambda built: torch.optim.lr_scheduler.LambdaLR(built, plan.lr_factor),
        config={
            "train_micro_batch_size_per_gpu": math.ceil(config.batch_size / (plan.world * plan.accumulation)),
            "gradient_accumulation_steps": plan.accumulation,
            "gradient_clipping": config.gradient_clipping,
            "zero_optimization": {"stage": config.zero_stage},
            "bf16": {"enabled": config.precision == "bf16"},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        },
        dist_init_required=False,
    )
    return engine, scheduler


def _resume(engine: Any, scheduler: Any, checkpoint: Path | None, world: int) -> _State:
    if checkpoint is None:
        return _State(world=world)
    state = _State(**json.loads((checkpoint / "state.json").read_text()))
    if state.world == world:
        engine.load_checkpoint(str(checkpoint / "deepspeed"), tag="state", load_module_strict=False)
    else:
        for _ in range(state.step):
            scheduler.step()
    state.world = world
    return state


def _step(
    engine: Any, scheduler: Any, task: Task, plan: Plan, seed: int, step: int, rank: int
) -> tuple[float, float, float]:
    """One optimizer step. Returns this worker's share of the mean loss, the learning rate and the gradient's norm."""
    batch = plan.batch(seed, step)
    lr = float(scheduler.get_last_lr()[0])
    torch.manual_seed(derive(seed, "step", step, rank))
    total = 0.0
    for piece in plan.micro_batches(batch, rank):
        # Every worker runs as many passes as the others, or the collectives would wait for ever.
        indices = (piece if len(piece) else batch[:1]).tolist()
        losses = task.losses(engine, indices)
        loss = losses.float().sum() / len(batch) * (1.0 if len(piece) else 0.0)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss at step {step} is {loss.item()}; its examples: {', '.join(task.names(indices)[:8])}",
                remedy="Lower training.lr, or set training.precision to fp32",
            )
        # DeepSpeed divides by passes and averages over workers; both are in our mean already.
        engine.backward(loss * plan.accumulation * plan.world)
        engine.step()
        total += loss.item()
    return total * plan.world, lr, float(engine.get_global_grad_norm() or 0.0)


def _validate(engine: Any, task: Task, plan: Plan, rank: int) -> dict[str, float]:
    """The task's metrics over all workers' shares of the validation examples."""
    engine.eval()
    with torch.no_grad():
        sums = task.validate(engine, rank, plan.world)
    engine.train()
    names = sorted(sums)
    values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=engine.device)
    if plan.world > 1:
        torch.distributed.all_reduce(values)
    return {name: float(total / max(1.0, count)) for name, (total, count) in zip(names, values.tolist(), strict=True)}


def _note(task: Task, plan: Plan, state: _State, step: int, metrics: Mapping[str, float]) -> None:
    """Notes a validation in `state`, and whether it was the best so far."""
    state.evaluations.append({"step": step, "epoch": step / plan.steps_per_epoch, **metrics})
    value = metrics[task.monitor]
    if state.best is None or ((value > state.best) == task.higher_is_better and value != state.best):
        state.best, state.best_step, state.since_best = value, step, 0
    else:
        state.since_best += 1


def _score(task: Task, evaluation: Mapping[str, float]) -> float:
    """What Ray Train sorts checkpoints by."""
    value = evaluation[task.monitor]
    # The newer of two equal scores must not replace the older one, which early stopping counts as the best.
    return (value if task.higher_is_better else -value) - 1e-9 * evaluation["step"]


def _evaluate_beside(engine: Any, task: Task, plan: Plan, state: _State, rank: int) -> None:
    """Hands the checkpoint over for validation, unless those before say that training should stop."""
    _collect(task, plan, state)
    if state.since_best < plan.config.patience:
        _report(engine, task, state, rank, {"score": UNKNOWN_SCORE, "step": state.step}, validate=True)
    _settle(task, plan, state, rank, wait=state.step == plan.total_steps)


def _settle(task: Task, plan: Plan, state: _State, rank: int, *, wait: bool = True) -> None:
    """Ends training where validations say so, or it has come to its end: with a last checkpoint of the state alone."""
    if wait:
        _collect(task, plan, state)
    state.done = state.step == plan.total_steps or state.since_best >= plan.config.patience
    if state.done:
        _report(None, task, state, rank, {"score": UNKNOWN_SCORE, "step": state.step})


def _collect(task: Task, plan: Plan, state: _State) -> None:
    """Notes the validations that are not noted yet; waits for the one that is under way.

    Raises:
        TrainingError: one failed.
    """
    known = {entry["step"] for entry in state.evaluations if entry["step"]}
    for reported in ray.train.get_all_reported_checkpoints():
        if reported.status is ReportedCheckpointStatus.VALIDATION_FAILED:
            raise TrainingError(
                f"the validation of step {reported.metrics['step']} failed",
                remedy="Ray's logs hold its traceback; training.async_validation=false validates in the workers",
            )
        if "validation" in reported.metrics and reported.metrics["step"] not in known:
            _note(task, plan, state, reported.metrics["step"], reported.metrics["validation"])


def _validate_checkpoint(
    checkpoint: ray.train.Checkpoint, *, build: Callable[..., Task], args: Sequence[Any]
) -> dict[str, Any]:
    """What Ray Train runs beside training: the metrics of a checkpoint's weights, and what it is sorted by."""
    task = build(*args)
    module = task.module()
    with _opened(checkpoint) as folder:
        assert folder is not None
        module.load_state_dict(load_file(folder / "trainable.safetensors"), strict=False)
        step = json.loads((folder / "state.json").read_text())["step"]
    module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with torch.no_grad():
        sums = task.validate(module, 0, 1)
    metrics = {name: float(total / max(1, count)) for name, (total, count) in sorted(sums.items())}
    return {"validation": metrics, "score": _score(task, {**metrics, "step": step})}


def _report(
    engine: Any | None, task: Task, state: _State, rank: int, metrics: dict[str, float], *, validate: bool = False
) -> None:
    """Writes a checkpoint and hands it to Ray Train. A barrier: every worker calls it as often as the others.

    Args:
        engine: None for a checkpoint of the state alone.
        metrics: what Ray Train keeps beside it.
        validate: whether it is to be validated beside training.
    """
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))  # Ray Train deletes it once it is uploaded.
    if engine is not None:
        _save(engine, task, folder, rank)
    if rank == 0:
        (folder / "state.json").write_text(json.dumps(asdict(state)))
        (folder / "monitor.json").write_text(json.dumps(task.monitor))
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        # Training goes on while a checkpoint is uploaded, but does not end before it is.
        checkpoint_upload_mode=CheckpointUploadMode.SYNC if state.done else CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        validation=validate,
    )


def _save(engine: Any, task: Task, folder: Path, rank: int) -> None:
    """Writes what resuming and inference need."""
    engine.save_checkpoint(str(folder / "deepspeed"), tag="state", exclude_frozen_parameters=True)
    if rank == 0:
        (folder / "weights").mkdir()
        task.save(engine.module, folder / "weights")
        trainable = {
            name: p.detach().contiguous().clone() for name, p in engine.module.named_parameters() if p.requires_grad
        }
        save_file(trainable, folder / "trainable.safetensors")


@contextlib.contextmanager
def _opened(checkpoint: ray.train.Checkpoint | None) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as local:
        yield Path(local)


def best_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics of the checkpoint that was kept."""
    return next(dict(entry) for entry in record["evaluations"] if entry["step"] == record["best_step"])
