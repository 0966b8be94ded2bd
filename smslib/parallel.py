"""One fit on several processes: each does its part of every batch, gradients are averaged."""

from __future__ import annotations

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from smslib.data import Cells
from smslib.model import SMSVAE, Terms

__all__ = ["SharedOut", "average", "check"]


class SharedOut(nn.Module):
    """A model whose every batch is shared out among processes.

    It takes the whole batch and returns the terms of this process's cells, weighted so that their
    mean, averaged over the processes, is the mean over the batch. The penalty is that of the whole
    screen in every process: averaged like the gradients, it counts once.

    Parameters
    ----------
    model : SMSVAE
        The same in every process, and changed in place.
    group : ProcessGroup
    """

    def __init__(self, model: SMSVAE, group: distributed.ProcessGroup) -> None:
        super().__init__()
        self.rank, self.size = group.rank(), group.size()
        self.model = DistributedDataParallel(model, process_group=group, broadcast_buffers=False)

    def forward(self, cells: Cells, *, n_draws: int = 1) -> Terms:
        """Return the weighted terms of this process's cells."""
        part = cells[self.rank :: self.size]
        weight = self.size * len(part) / len(cells)
        # Every process takes part in every step: with a cell of weight 0 where none is left.
        terms = self.model(part or cells[:1], n_draws=n_draws)
        return Terms(weight * terms.reconstruction, weight * terms.kl, terms.penalty)


def average(values: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """Return the mean of a tensor over the processes; the tensor itself without a group."""
    if group is None:
        return values
    total = values.clone()
    distributed.all_reduce(total, group=group)
    return total / group.size()


def check(model: SMSVAE, given: object, group: distributed.ProcessGroup) -> None:
    """Refuse a fit that its processes would not do alike.

    Parameters
    ----------
    model : SMSVAE
    given : object
        What must be equal in all processes.
    group : ProcessGroup

    Raises
    ------
    ValueError
        If it differs, or the model normalises over batches, which no process sees whole.
    """
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        raise ValueError(
            "norm='batch' needs whole batches, and with group= every process has a part of them; "
            "use norm='layer' or norm='none', or one process"
        )
    every: list[object] = [None] * group.size()
    distributed.all_gather_object(every, given, group=group)
    differing = [rank for rank, other in enumerate(every) if other != given]
    if differing:
        raise ValueError(
            f"process {group.rank()} was given {given}, process {differing[0]} "
            f"{every[differing[0]]}; give all the same model, cells and configuration (last comes "
            "a digest of their values): batches are shared out by fit itself"
        )
