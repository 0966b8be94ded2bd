r"""Which latents the targets of a screen can tell apart, whatever model is fitted.

Where sums of perturbations are known up to a linear map of the latents, the map L that an estimate
may still differ by must not add an edge to the graph of targets and latents. Generically an
estimate of latent i then contains latent j only if every target that moves j also moves i:

.. math:: L_{ij} \ne 0 \;\Rightarrow\; \{t : j \in T_t\} \subseteq \{t : i \in T_t\}

(Lachapelle et al. 2022, Theorem 5 and its graphical criterion; the paper's App. H). What is
diagnosed here is the design, not a fit: a design that passes can still be fitted badly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a graph of targets and latents identifies.

    Parameters
    ----------
    reached : array of bool, (n_latent,)
        Whether any target moves the latent.
    rank : int
        Of the shifts; below the number of latents they are not even identified up to a linear map.
    mixes : array of bool, (n_latent, n_latent)
        ``mixes[i, j]``: an estimate of latent i may contain latent j. The diagonal is true; rows
        of latents that are never moved are true at every other latent that is not, and columns of
        those at every latent: nothing says where they are.
    """

    reached: Bool[np.ndarray, " latent"]
    rank: int
    mixes: Bool[np.ndarray, "latent latent"]

    @property
    def criterion(self) -> bool:
        """Whether every latent is identified: the graphical criterion and full rank."""
        return bool(self.alone.all()) and self.rank == len(self.reached)

    @property
    def rotations(self) -> Bool[np.ndarray, "latent latent"]:
        """What is left of ``mixes`` where the variances are known, as in an sVAE+.

        L is then a rotation, and one that mixes two latents mixes them both ways: only latents
        with the same targets stay mixed.
        """
        return self.mixes & self.mixes.T

    @property
    def alone(self) -> Bool[np.ndarray, " latent"]:
        """Whether an estimate of the latent contains no other."""
        return self.mixes.sum(1) == 1

    def partners(self, latent: int) -> tuple[int, ...]:
        """Return the other latents that an estimate of one may contain.

        Raises
        ------
        IndexError
            If there is no such latent.
        """
        if not 0 <= latent < len(self.reached):
            raise IndexError(f"no latent {latent}; expected 0 to {len(self.reached) - 1}")
        return tuple(j for j in np.flatnonzero(self.mixes[latent]).tolist() if j != latent)


def diagnose(
    graph: Shaped[np.ndarray, ...],
    *,
    shift: Shaped[np.ndarray, ...] | None = None,
) -> Diagnosis:
    """Say which latents a graph identifies.

    Parameters
    ----------
    graph : array, (n_targets, n_latent)
        Whether the target moves the latent (0 and 1, or booleans).
    shift : array, (n_targets, n_latent), optional
        By how much. Without it shifts are taken to be generic, with the largest rank that the
        graph allows.

    Returns
    -------
    Diagnosis

    Raises
    ------
    ValueError
        If the graph is no matrix of zeros and ones, or the shift has another shape or moves a
        latent where the graph has no edge.
    """
    edges = _checked(graph, shift)
    reached = edges.any(0)
    # Of the targets that move j (columns), how many do not move i (rows)?
    missing = (~edges).astype(int).T @ edges.astype(int)
    return Diagnosis(reached, _rank(edges, shift), missing == 0)


def _checked(
    graph: Shaped[np.ndarray, ...], shift: Shaped[np.ndarray, ...] | None
) -> Bool[np.ndarray, "target latent"]:
    graph = np.asarray(graph)
    if graph.ndim != 2 or graph.size == 0 or not np.isin(graph, (0, 1)).all():
        raise ValueError(
            f"the graph has shape {graph.shape} and values such as {graph.ravel()[:3].tolist()}; "
            "expected (n_targets, n_latent) of zeros and ones (threshold probabilities first)"
        )
    edges = graph.astype(bool)
    if shift is not None and np.shape(shift) != edges.shape:
        raise ValueError(f"shift has shape {np.shape(shift)}; expected the graph's {edges.shape}")
    if shift is not None and (np.asarray(shift)[~edges] != 0).any():
        raise ValueError("a shift is not zero where the graph has no edge; set it to zero there")
    return edges


def _rank(
    edges: Bool[np.ndarray, "target latent"], shift: Float[np.ndarray, "target latent"] | None
) -> int:
    """Return the rank of the shifts; of generic ones, the largest matching of the graph."""
    if shift is not None:
        return int(np.linalg.matrix_rank(np.asarray(shift, dtype=float)))
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    matched = maximum_bipartite_matching(csr_array(edges.astype(np.int8)), perm_type="column")
    return int((matched >= 0).sum())
