"""What `pulse-ray serve` does and says: addresses on standard output, progress and warnings on standard error."""

from __future__ import annotations

import json
import shlex
import signal
import threading

from pulse_ray.config import Config
from pulse_ray.progress import console
from pulse_ray.serving import guard
from pulse_ray.serving.filling import fill, opened, store_address
from pulse_ray.workspace import Workspace


def intent(config: Config) -> str:
    """What would be served, in one line.

    Raises:
        ConfigError: another host without tokens, or no place for the store.
    """
    digests = guard.token_digests(config.serve)
    guard.check_host(config.serve.host, digests)
    asked = f"{len(digests)} tokens" if digests else "no tokens: this machine only"
    variant = config.ranker.served(config.serve.variant)
    return (
        f"Would serve variant '{variant}' of {Workspace(config.storage, config.name).path} "
        f"on http://{config.serve.host}:{config.serve.port} ({asked}; profiles in {store_address(config)})"
    )


def run(config: Config) -> None:
    """Serves until Ctrl-C or SIGTERM, which ends it as cleanly.

    Raises:
        PulseError: as `app.serving`.
    """
    open_to_all = not guard.token_digests(config.serve)
    guard.check_host(config.serve.host, () if open_to_all else ("token",))
    if open_to_all:
        console.print(
            "[yellow]warning:[/] no tokens are set, so whoever works on this machine may ask; "
            f"{config.serve.host} is all that is listened on",
            highlight=False,
        )
    from pulse_ray.serving import app

    console.print(f"Filling the profile store {store_address(config)}", highlight=False, markup=False)
    written = fill(config)
    console.print(f"      {written:,} profiles" if written else "      filled already", highlight=False)
    console.print(f"Starting: variant '{config.ranker.served(config.serve.variant)}'", highlight=False)
    with app.serving(config) as address:
        print(f"Page:    {address}/")
        print(f"Try:     {curl(config, address, example_user(config))}", flush=True)
        console.print("Ctrl-C ends it.", highlight=False)
        over = threading.Event()
        # Ray would take the signal for a crash. Set here, as Ray sets its own handlers when it starts.
        signal.signal(signal.SIGTERM, lambda *_: over.set())
        # In slices, so that a signal is noticed on every platform.
        while not over.wait(1):
            pass


def example_user(config: Config) -> str | None:
    """A user who can be asked for: the first of the store."""
    with opened(config) as store:
        found = store.find(config.prepare.domains[0].name, "", 1)
    return found[0] if found else None


def curl(config: Config, address: str, user: str | None) -> str:
    """A line for a shell that ranks for a user.

    Args:
        user: whom to rank for; None writes a place-holder.
    """
    body: dict[str, str] = {"user_id": user or "USER"}
    if len(config.prepare.domains) > 1:
        body = {"domain": config.prepare.domains[0].name, **body}
    words = ["curl", "-s", f"{address}/v1/rank", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    line = shlex.join(words)
    if guard.token_digests(config.serve):
        line += ' -H "Authorization: Bearer $TOKEN"'
    return line
