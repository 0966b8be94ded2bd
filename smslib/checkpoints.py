"""The state of a fit in a file: what was interrupted goes on from its last whole epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from smslib import files, tensors
from smslib.data import Batches, Cells

__all__ = ["Checkpoint", "Stateful", "identity"]


@runtime_checkable
class Stateful(Protocol):
    """What can say where it is and be put back there."""

    def state_dict(self) -> dict[str, object]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, object]) -> object:
        """Take up a state."""


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds a fit after its last whole epoch; a path of None holds nothing.

    Parameters
    ----------
    path : Path, optional
    fit : str
        Which fit it is, from `identity`.
    parts : mapping of str to Stateful
        All that moves, besides the random generators.
    order : Generator
        Of the batches; torch's own, of the draws, are kept, too.
    device : device
        Where the fit runs.
    """

    path: Path | None
    fit: str
    parts: Mapping[str, Stateful]
    order: torch.Generator
    device: torch.device

    def write(self, epochs_done: int) -> None:
        """Keep the present state in the place of the last one.

        Raises
        ------
        OSError
            If it cannot be written; the last one is kept.
        """
        if self.path is None:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"fit": self.fit, "epochs_done": epochs_done, "random": self._random()}
        with files.whole(self.path) as draft:
            tensors.write(state, draft)

    def resume(self) -> int:
        """Go back to the state that is kept; return the epochs that it has behind it.

        Raises
        ------
        ValueError
            If the file is damaged, of another fit, or of one on another kind of device.
        """
        if self.path is None or not self.path.exists():
            return 0
        state = self._read(self.path)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, bits in state["random"].items():
            self._generators()[name].set_state(bits)
        return state["epochs_done"]

    def _read(self, path: Path) -> dict:
        try:
            state = tensors.read(path)
            known = state["fit"]
        except (MemoryError, OSError):
            raise
        except Exception as error:  # damaged files lead to errors of all kinds
            raise ValueError(
                f"{path} is no whole checkpoint ({type(error).__name__}: {error}); remove it to "
                "begin the fit anew"
            ) from error
        if known != self.fit:
            raise ValueError(
                f"{path} is the checkpoint of another fit: other initial weights, cells or "
                "configuration; name another file, or remove this one to begin anew"
            )
        if state["random"].keys() != self._generators().keys():
            raise ValueError(
                f"{path} is the checkpoint of a fit on another kind of device than {self.device}, "
                "whose draws cannot go on here; fit there, or remove it to begin anew"
            )
        return state

    def _random(self) -> dict[str, torch.Tensor]:
        return {name: generator.get_state() for name, generator in self._generators().items()}

    def _generators(self) -> dict[str, torch.Generator]:
        found = {"order": self.order, "draws": torch.default_generator}
        if self.device.type == "cuda":
            found["draws on the device"] = torch.cuda.default_generators[self.device.index or 0]
        return found


def identity(
    weights: Mapping[str, torch.Tensor], settings: object, *cells: Cells | Batches | None
) -> str:
    """Return a digest of what decides a fit.

    Parameters
    ----------
    weights : mapping of str to Tensor
        The initial ones.
    settings : object
        Of model and training: anything whose ``repr`` tells its values.
    *cells : Cells or Batches, optional
        Counts and conditions; of Batches, which may be endless files, their number alone.

    Returns
    -------
    str
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, part in weights.items():
        digest.update(name.encode() + part.detach().cpu().contiguous().numpy().tobytes())
    for some in cells:
        digest.update(repr(_summary(some)).encode())
    return digest.hexdigest()


def _summary(cells: Cells | Batches | None) -> tuple[int | float, ...] | None:
    """Return numbers that other cells, or the same in another order, hardly share."""
    if not isinstance(cells, Cells):
        return None if cells is None else (cells.n_cells,)
    place = torch.arange(1, len(cells) + 1, device=cells.device, dtype=torch.float64)
    per_cell, per_gene = (cells.counts.sum(axis, dtype=torch.float64) for axis in (1, 0))
    genes = torch.arange(1, cells.n_genes + 1, device=cells.device, dtype=torch.float64)
    sums = place @ per_cell, place @ cells.condition.double(), genes @ per_gene
    return (len(cells), *(value.item() for value in sums))
