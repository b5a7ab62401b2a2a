"""Prometheus metrics of one ingress replica."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Meters:
    """Counts answers. The registry is its own, so that several applications may share a process.

    Args:
        replica: names the replica in every series; several replicas count each for itself.
    """

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._replica = replica
        self._requests = Counter(
            "pulse_requests", "Requests answered", ("replica", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "pulse_request_seconds",
            "Time to answer, seconds",
            ("replica", "route"),
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._reasons = Counter(
            "pulse_reasons", "Rankings by the source of their reason", ("replica", "source"), registry=self._registry
        )

    def count(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer. `route` is a route's pattern, never a path that somebody made up."""
        self._requests.labels(self._replica, route, str(status)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def count_reason(self, source: str) -> None:
        """Counts a ranking."""
        self._reasons.labels(self._replica, source).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """ASGI middleware that counts every answer, those of the middleware below it too."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.meters.count(route, status, time.perf_counter() - started)
