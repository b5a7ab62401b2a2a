"""An executor for vLLM that notes when its second step began, where only the engine itself can see it.

In the first it may still compile.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor

NOTES = "PULSE_RAY_STEPS"
"""Variable that names the file of the times: a line for each engine, in seconds since 1970."""


class Noting(UniProcExecutor):
    """As the executor that the engines of pulse_ray use on CPU."""

    steps = 0

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Computes a step."""
        self.steps += 1
        if self.steps == 2:
            with Path(os.environ[NOTES]).open("a") as notes:
                notes.write(f"{time.time()}\n")
        return super().execute_model(*args, **kwargs)
