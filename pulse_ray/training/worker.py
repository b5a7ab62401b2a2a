"""What every worker of a training run does: steps, validations and checkpoints, until there is nothing left to do."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointUploadMode, ReportedCheckpointStatus
from safetensors.torch import load_file, save_file
from torch import nn

from pulse_ray.config import TrainingConfig
from pulse_ray.errors import TrainingError
from pulse_ray.seeding import derive
from pulse_ray.training import checkpoints
from pulse_ray.training.board import News
from pulse_ray.training.checkpoints import State
from pulse_ray.training.plan import Plan
from pulse_ray.training.task import Task

UNKNOWN_SCORE = -1e30
"""Of a checkpoint that is not validated yet, or holds no weights: worse than any."""

LOSS_POINTS = 200
"""Points of the loss curve that are kept, at most."""

NAMED = 8
"""Examples that an error names, at most."""

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L40": 181e12,
    "L4": 121e12,
}
"""Of a GPU's tensor cores in bf16, dense, by what stands in its name; as their makers say."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `TorchTrainer` hands to every worker. `board` is a `Board` in an actor."""

    build: Callable[..., Task]
    args: Sequence[Any]
    config: TrainingConfig
    seed: int
    board: Any


def work(settings: Mapping[str, Job]) -> None:
    """Trains a `job`, from the newest checkpoint on."""
    job = settings["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(job.config.workers.threads or max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(derive(job.seed, "weights"))
    task = job.build(*job.args)
    limit = ray.get(job.board.limit.remote())
    plan = Plan(examples=len(task), world=world, config=job.config, pass_limit=limit)
    if plan.examples == 0:
        raise TrainingError("there are no training examples", remedy="Lower prepare.min_user_interactions, or add data")
    refused: list[str] = []
    with checkpoints.newest(refused) as checkpoint:
        if rank == 0:
            for notice in refused:
                job.board.say.remote(f"{notice}; training goes on from the one before")
        if checkpoint and State.read(checkpoint).done:
            return  # Its driver was killed before it could take the result.
        engine, scheduler = _engine(task.module(), plan, checkpoint)
        state = _resume(engine, scheduler, checkpoint, world)
    parts = {"engine": engine, "scheduler": scheduler, "rank": rank, "kept": state.step}
    _Run(job=job, task=task, plan=plan, state=state, **parts).go()


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """An optimizer step: the mean loss over its batch, all workers together, and what they read."""

    loss: float
    lr: float
    norm: float | None
    """Of the gradient before it is clipped; None where DeepSpeed does not tell (ZeRO-0 in fp32)."""
    tokens: float
    places: float


@dataclass(kw_only=True)
class _Run:
    """A worker's part of a run."""

    job: Job
    task: Task
    plan: Plan
    state: State
    engine: Any
    scheduler: Any
    rank: int
    kept: int
    """The step of the last checkpoint; 0 where there is none."""

    def go(self) -> None:
        """Steps, validations and checkpoints to the end."""
        plan, state = self.plan, self.state
        beside = plan.config.async_validation
        if beside and state.step:
            self._settle()
        if self.task.validate_first and state.step == 0:
            state.evaluations.append({"step": 0, "epoch": 0.0, **self._validate()})
        flops = _flops_per_token(self.engine.module, plan.config)
        while not state.done:
            started = time.perf_counter()
            stepped = self._step()
            if stepped is None:
                return
            state.step += 1
            if state.step % math.ceil(plan.total_steps / LOSS_POINTS) == 0:
                state.steps.append({"step": state.step, "loss": stepped.loss, "lr": stepped.lr})
            if self.rank == 0:
                self._tell(_figures(stepped, time.perf_counter() - started, flops))
            last = state.step == plan.total_steps
            if state.step % plan.evaluation_interval == 0 or last:
                if beside:
                    self._evaluate_beside()
                    continue
                _note(self.task, plan, state, state.step, self._validate())
                state.done = last or state.since_best >= plan.config.patience
                if self.rank == 0:
                    told = {k: v for k, v in state.evaluations[-1].items() if k not in ("step", "epoch")}
                    self._tell({f"validation/{name}": value for name, value in told.items()})
                self._report({"score": _score(self.task, state.evaluations[-1]), "step": state.step})

    def _tell(self, figures: dict[str, float]) -> None:
        self.job.board.put.remote(News(step=self.state.step, total=self.plan.total_steps, figures=figures))

    def _step(self) -> Stepped | None:
        """One optimizer step; None where a loss is not finite and training must end."""
        plan, task, step = self.plan, self.task, self.state.step
        batch = plan.batch(self.job.seed, step)
        lr = float(self.scheduler.get_last_lr()[0])
        torch.manual_seed(derive(self.job.seed, "step", step, self.rank))
        tokens, places = task.read.tokens, task.read.places
        total, wrong = 0.0, list[int]()
        pieces = plan.micro_batches(batch, self.rank)
        for place, piece in enumerate(pieces):
            # Every worker runs as many passes as the others, or the collectives would wait for ever.
            indices = (piece if len(piece) else batch[:1]).tolist()
            with self._fitting(len(indices)):
                losses = task.losses(self.engine, indices).float()
                loss = losses.sum() / len(batch) * (1.0 if len(piece) else 0.0)
                # DeepSpeed divides by passes and averages over workers; both are in our mean already.
                self.engine.backward(loss * plan.accumulation * plan.world)
            wrong += [index for index, fine in zip(indices, losses.isfinite().tolist(), strict=True) if not fine]
            total += loss.item()
            if place < len(pieces) - 1:
                self.engine.step()
        read = (task.read.tokens - tokens, task.read.places - places)
        total, tokens_read, places_read, flawed = self._sum([total, *read, len(wrong)])
        if flawed or not math.isfinite(total):
            if wrong or (not flawed and self.rank == 0):  # Of several workers, whose examples they are.
                self._stop(total, wrong or batch.tolist())
            return None
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        told = None if norm is None else float(norm)
        return Stepped(loss=total, lr=lr, norm=told, tokens=tokens_read, places=places_read)

    @contextlib.contextmanager
    def _fitting(self, examples: int) -> Iterator[None]:
        """Tells the board of a pass that needs more memory than there is."""
        try:
            yield
        except RuntimeError as error:
            # The second is the CPU's allocator.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if examples > 1 and self.task.divisible:
                ray.get(self.job.board.does_not_fit.remote(examples))
            raise TrainingError(
                f"a pass of {examples} example{'s' * (examples > 1)} needs more memory than there is",
                remedy="Shorten its texts (max_tokens), lower training.batch_size, use more workers, or for the ranker "
                "switch gradient_checkpointing on or set training.zero_stage to 3",
            ) from error

    def _stop(self, loss: float, wrong: Sequence[int]) -> None:
        """Tells why all workers end now."""
        last = f"the last checkpoint is that of step {self.kept}" if self.kept else "there is no checkpoint yet"
        names = ", ".join(self.task.names(wrong)[:NAMED])
        error = TrainingError(
            f"the loss at step {self.state.step} is {loss}; its examples: {names}; {last}",
            remedy="Lower training.lr, or set training.precision to fp32",
        )
        ray.get(self.job.board.stop.remote(error))

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all workers."""
        found = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        if self.plan.world > 1:
            torch.distributed.all_reduce(found)
        return [float(value) for value in found.tolist()]

    def _validate(self) -> dict[str, float]:
        """The task's metrics over all workers' shares of the validation examples."""
        self.engine.eval()
        with torch.no_grad():
            sums = self.task.validate(self.engine, self.rank, self.plan.world)
        self.engine.train()
        names = sorted(sums)
        found = self._sum([value for name in names for value in sums[name]])
        return {name: found[2 * place] / max(1.0, found[2 * place + 1]) for place, name in enumerate(names)}

    def _evaluate_beside(self) -> None:
        """Hands the checkpoint over for validation, unless those before say that training should stop."""
        self._collect()
        if self.state.since_best < self.plan.config.patience:
            self._report({"score": UNKNOWN_SCORE, "step": self.state.step}, validate=True)
        self._settle(wait=self.state.step == self.plan.total_steps)

    def _settle(self, *, wait: bool = True) -> None:
        """Ends training where validations say so or nothing is left: with a last checkpoint of the state alone."""
        if wait:
            self._collect()
        state, plan = self.state, self.plan
        state.done = state.step == plan.total_steps or state.since_best >= plan.config.patience
        if state.done:
            self._report({"score": UNKNOWN_SCORE, "step": state.step}, weights=False)

    def _collect(self) -> None:
        """Notes the validations that are not noted yet; waits for the one that is under way.

        Raises:
            TrainingError: one failed.
        """
        known = {entry["step"] for entry in self.state.evaluations if entry["step"]}
        for reported in ray.train.get_all_reported_checkpoints():
            if reported.status is ReportedCheckpointStatus.VALIDATION_FAILED:
                raise TrainingError(
                    f"the validation of step {reported.metrics['step']} failed",
                    remedy="Ray's logs hold its traceback; training.async_validation=false validates in the workers",
                )
            if "validation" in reported.metrics and reported.metrics["step"] not in known:
                _note(self.task, self.plan, self.state, reported.metrics["step"], reported.metrics["validation"])

    def _report(self, metrics: dict[str, float], *, validate: bool = False, weights: bool = True) -> None:
        """Writes a checkpoint and hands it to Ray Train. A barrier: every worker calls it as often as the others.

        Args:
            metrics: what Ray Train keeps beside it.
            validate: whether it is to be validated beside training.
            weights: whether it holds more than the state.
        """
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))  # Ray Train deletes it once it is uploaded.
        if weights:
            self._save(folder)
            self.kept = self.state.step
        if self.rank == 0:
            self.state.write(folder)
            (folder / checkpoints.MONITOR).write_text(json.dumps(self.task.monitor))
        checkpoints.seal(folder, self.rank)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            # Training goes on while a checkpoint is uploaded, but does not end before it is.
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if self.state.done else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            validation=validate,
        )

    def _save(self, folder: Path) -> None:
        """Writes what resuming and inference need."""
        self.engine.save_checkpoint(str(folder / checkpoints.DEEPSPEED), tag="state", exclude_frozen_parameters=True)
        module = self.engine.module
        trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        with _whole(self.plan.config, trainable.values()):
            if self.rank == 0:
                (folder / checkpoints.WEIGHTS).mkdir()
                self.task.save(module, folder / checkpoints.WEIGHTS)
                found = {name: value.detach().contiguous().clone() for name, value in trainable.items()}
                save_file(found, folder / checkpoints.TRAINABLE)


def _whole(config: TrainingConfig, parameters: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside of it parameters are whole, where ZeRO-3 has cut them among the workers."""
    if config.zero_stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))  # type: ignore[no-any-return]


def _engine(module: nn.Module, plan: Plan, checkpoint: Path | None) -> tuple[Any, Any]:
    """A DeepSpeed engine around `module`, with the checkpoint's trainable weights where there is one."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On CPU DeepSpeed compiles an all-reduce over shared memory, for a minute; gloo has one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if checkpoint:
        # Before the engine exists: it copies the weights into its own master weights when it is built.
        missing = module.load_state_dict(load_file(checkpoint / checkpoints.TRAINABLE), strict=False)
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


def _resume(engine: Any, scheduler: Any, checkpoint: Path | None, world: int) -> State:
    if checkpoint is None:
        return State(world=world)
    state = State.read(checkpoint)
    if state.world == world:
        engine.load_checkpoint(str(checkpoint / checkpoints.DEEPSPEED), tag="state", load_module_strict=False)
    else:
        for _ in range(state.step):
            scheduler.step()
    state.world = world
    return state


def _flops_per_token(module: nn.Module, config: TrainingConfig) -> float | None:
    """Of forward and backward, over this GPU's peak; None where that is not known.

    Two for a weight in the forward pass, two for its input's gradient, and two for its own, if it is trained.
    Embeddings are looked up, attention itself is left out, and a ranker's last layer is counted in full.
    """
    if not torch.cuda.is_available() or config.precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
    if peak is None:
        return None
    looked_up = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    computed = [one for one in module.parameters() if id(one) not in looked_up]
    return sum(_size(one) * (6 if one.requires_grad else 4) for one in computed) / peak


def _size(weight: Any) -> int:
    """Numbers of a weight, cut among workers or packed into four bits as it may be."""
    packed = getattr(weight, "quant_state", None)
    return int(packed.shape.numel() if packed is not None else getattr(weight, "ds_numel", weight.numel()))


def _figures(stepped: Stepped, seconds: float, peak_share: float | None) -> dict[str, float]:
    """What is told and plotted of a step."""
    found = {"loss": stepped.loss, "lr": stepped.lr}
    if stepped.norm is not None:
        found["grad"] = stepped.norm
    if stepped.places:
        found |= {"tokens/s": stepped.tokens / seconds, "padding": 1 - stepped.tokens / stepped.places}
    if peak_share is not None:
        workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        found["mfu"] = stepped.tokens / workers / seconds * peak_share
    return found


def _note(task: Task, plan: Plan, state: State, step: int, metrics: Mapping[str, float]) -> None:
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


def validate_checkpoint(
    checkpoint: ray.train.Checkpoint, *, build: Callable[..., Task], args: Sequence[Any]
) -> dict[str, Any]:
    """What Ray Train runs beside training: the metrics of a checkpoint's weights, and what it is sorted by."""
    task = build(*args)
    module = task.module()
    with checkpoints.opened(checkpoint) as folder:
        module.load_state_dict(load_file(folder / checkpoints.TRAINABLE), strict=False)
        step = State.read(folder).step
    module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with torch.no_grad():
        sums = task.validate(module, 0, 1)
    metrics = {name: float(total / max(1, count)) for name, (total, count) in sorted(sums.items())}
    return {"validation": metrics, "score": _score(task, {**metrics, "step": step})}
