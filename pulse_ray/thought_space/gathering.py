"""What all workers' batches hold, in every worker: a batch cut among workers keeps the negatives of the whole."""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F


def workers() -> tuple[int, int]:
    """This worker's rank, and how many there are."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Rows of all workers, one worker after the other: [Σ sizes, …]. Gradients flow back to where they come from.

    Args:
        rows: this worker's: [sizes[rank], …].
        sizes: of all workers.
    """
    if len(sizes) == 1:
        return rows
    most = max(sizes)
    padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, most - len(rows)))
    if rows.requires_grad:
        found = all_gather(padded)  # type: ignore[no-untyped-call]
    else:
        found = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(found, padded)
    return torch.cat([one[:size] for one, size in zip(found, sizes, strict=True)])


def sizes(count: int, device: torch.device) -> list[int]:
    """How many rows each worker has."""
    _, world = workers()
    if world == 1:
        return [count]
    found = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    distributed.all_gather(found, torch.tensor([count], device=device))
    return [int(one) for one in found]
