"""Variables that the processes of a run need in their environment, on one machine and on a cluster alike.

They stand apart from `runtime`, because a command that submits a job needs them before it may import Ray.
"""

from __future__ import annotations

WORKER_ENVIRONMENT = {
    # Ray would hide GPUs from an actor that asks for none; vLLM and DeepSpeed decide for themselves.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Threads that wait spin only briefly: several processes share the cores.
    "GOMP_SPINCOUNT": "20000",
    # Ray Train's controller looks after its workers so often, and a report waits for its next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
"""What the processes of a run need in their environment on any machine; a submitted job carries it along."""
