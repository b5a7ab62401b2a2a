"""`pulse-ray score`: users from outside the experiment through a pool of rankers, shard by shard.

The output is a folder like a run's: `user_scores`, `recommendations` and `rejects/score`, in parts that are committed
one by one, so a job that was killed goes on where it was. Its fingerprint names ranker, variant, settings and input.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from pulse_ray import pipeline
from pulse_ray.config import Config, Variant
from pulse_ray.errors import ArtifactError, DataError
from pulse_ray.ranker.prompts import TEMPLATE_SHA
from pulse_ray.runtime import cluster, run_shards
from pulse_ray.scoring.users import Users, open_users
from pulse_ray.scoring.worker import MakeScorer, UserWorker, trained
from pulse_ray.workspace import Condition, StageRun, StageSpec, Workspace, locate

SPEC = StageSpec(
    name="score",
    summary="rank candidates for users from outside the experiment",
    settings=("seed", "score"),
    inputs=("items", "sasrec", "reasons", "ranker"),
    outputs=("user_scores", "recommendations"),
    constants=(TEMPLATE_SHA,),
    rows="users",
    key="row_id",
)


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """A job that is ready to run: its input, its ranker, and the stage that is bound to its output."""

    users: Users
    variant: Variant
    stage: StageRun

    @property
    def version(self) -> str:
        """Names the ranker in the output: variant@fingerprint."""
        return f"{self.variant}@{self.stage.input_fingerprints['ranker']}"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a job did. `ran` is False where everything had been scored before."""

    ran: bool
    users: int
    rejects: Mapping[str, int]
    """Users that were set aside, by reason."""
    seconds: float


def prepare(config: Config, users: str, output: str) -> ScoreJob:
    """The job that scores the users at one address into another. Nothing is written, and no Ray is started.

    Args:
        users: path or URI of a parquet file, or of a folder of such.
        output: path or URI of a folder, which need not exist.

    Raises:
        DataError: the users cannot be read.
        ArtifactError: the run holds no ranker made from today's settings, or an address cannot be reached.
    """
    plan = pipeline.plan(config)
    made_by = {artefact: run.fingerprint for run in plan.values() for artefact in run.spec.outputs}
    inputs = {name: made_by[name] for name in SPEC.inputs}
    found = open_users(users, [domain.name for domain in config.prepare.domains])
    variant = config.ranker.served(config.score.variant)
    # Named or left unset, the same ranker gives the same scores.
    config = config.model_copy(update={"score": config.score.model_copy(update={"variant": variant})})
    marks = [*inputs.values(), *SPEC.constants, *(file.mark for file in found.files)]
    stage = StageRun(
        workspace=Workspace(output, ""),
        config=config,
        spec=SPEC,
        fingerprint=config.fingerprint(SPEC.settings, marks),
        input_fingerprints=inputs,
        source=Workspace(config.storage, config.name),
    )
    folder = locate(users)[1].rstrip("/")
    if stage.workspace.path.startswith(f"{folder}/"):
        raise ArtifactError(
            f"the output {output} lies inside the input {users}", remedy="Give an --output outside of it"
        )
    stage.workspace.claimed()
    pipeline.check_inputs(stage, plan)
    return ScoreJob(users=found, variant=variant, stage=stage)


def condition(job: ScoreJob) -> Condition:
    """How far the output is.

    Raises:
        ArtifactError: it holds what was made from another input, ranker or setting.
    """
    found = job.stage.condition()
    if found == "stale":
        raise ArtifactError(
            f"{job.stage.workspace.path} holds scores of another input, ranker or setting",
            remedy="Give another --output, or delete that folder",
        )
    return found


def run(job: ScoreJob, make_scorer: MakeScorer = trained) -> Scored:
    """Scores the users that the output lacks.

    Raises:
        ArtifactError: the output belongs to another job.
        DataError: the input is damaged, changes while it is read, or too many of its users were set aside; what was
            scored stays.
    """
    started = time.monotonic()
    ran = condition(job) != "complete"
    if ran:
        score = job.stage.config.score
        with cluster(job.stage.config.cluster):
            job.stage.begin()
            run_shards(
                job.stage,
                job.users.shards(score.shard_users),
                UserWorker,
                *(job.stage, job.users, job.variant, job.version, make_scorer),
                pool=score.pool,
                title="score: users",
            )
        _check_rejects(job)
        job.stage.complete(time.monotonic() - started)
    return Scored(
        ran=ran, users=job.users.rows, rejects=job.stage.rejected(), seconds=round(time.monotonic() - started, 2)
    )


def _check_rejects(job: ScoreJob) -> None:
    rejected, most = job.stage.rejected(), job.stage.config.score.max_reject_fraction
    if sum(rejected.values()) > most * job.users.rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        raise DataError(
            f"{sum(rejected.values()):,} of {job.users.rows:,} users were set aside ({reasons}), more than {most:.0%}",
            remedy=f"Look at {job.stage.rejects.path}; mend the input, or raise score.max_reject_fraction",
        )
