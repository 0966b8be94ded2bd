"""The scverse-style front: data, model, training and evaluation behind the usual verbs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from smslib import recipes
from smslib.data import from_anndata, split_cells
from smslib.evaluate import elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.train import History, TrainConfig, fit

if TYPE_CHECKING:
    import anndata
    import pandas as pd

__all__ = ["SMS"]

_SETUP = "_smslib"  # where setup_anndata leaves its note, in adata.uns


class SMS:
    """A sparse mechanism shift model of one screen.

    Parameters
    ----------
    adata : AnnData
        Prepared by `setup_anndata`.
    method : {"svae+", "svae", "ivae", "vae", "beta-vae", "cpa-vae", "sams-vae"}
    n_latent : int
    recipe : {"smslib", "corrected", "paper"}
        A key of `smslib.recipes.RECIPES`.
    sparsity : float, optional
        As in `smslib.recipes.build`.
    seed : int
        Of the split, the initial weights, the batches and the draws.
    device : str

    Raises
    ------
    ValueError
        If `setup_anndata` was not called, or the counts do not pass `smslib.data.from_anndata`,
        which also refuses cells without a condition.

    Notes
    -----
    Where the recipe has Gauss-Newton inference (``"smslib"``), q is ``q(z | x, c)``: steps move
    the encoder's mean towards the mode of ``p(z | x, c)``, whose prior is that of the cell's
    condition. Latents, ELBO and IWELBO of a cell then depend on its label, and a label that is
    wrong pulls the cell's latents towards the wrong shift. In other recipes q is ``q(z | x)``.

    Examples
    --------
    ::

        SMS.setup_anndata(adata, perturbation_key="target", control="non-targeting")
        model = SMS(adata)
        model.train()
        model.get_graph()
    """

    def __init__(
        self,
        adata: anndata.AnnData,
        *,
        method: str = "svae+",
        n_latent: int = 15,
        recipe: str = "smslib",
        sparsity: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.adata = adata
        self.seed = seed
        self.history: History | None = None
        self._cells, self._design = _read(adata)
        self._cells = self._cells.to(device)
        self._train, self._validation = split_cells(self._cells, (0.9, 0.1), seed=seed)
        self._options = {
            "method": method,
            "recipe": recipe,
            "n_latent": n_latent,
            "sparsity": sparsity,
            "seed": seed,
        }
        self.module, _ = self._build()
        self.module.to(device)

    @staticmethod
    def setup_anndata(
        adata: anndata.AnnData,
        *,
        perturbation_key: str,
        control: str,
        layer: str | None = None,
        sep: str = "+",
    ) -> None:
        """Check the counts and note in ``adata.uns`` where counts and conditions are.

        Parameters
        ----------
        adata, perturbation_key, control, layer, sep
            As in `smslib.data.from_anndata`, which also lists what is refused.
        """
        note = {"perturbation_key": perturbation_key, "control": control, "sep": sep}
        if layer is not None:
            note["layer"] = layer
        from_anndata(adata, **note)
        adata.uns[_SETUP] = note

    def train(
        self,
        *,
        epochs: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> History:
        """Fit the model and return the history.

        The weights kept are those of the recipe: with "paper" the last ones, otherwise the best
        on the tenth of the cells that validate.

        Parameters
        ----------
        epochs : int, optional
            Instead of the recipe's number; a warm-up that is a share of the epochs follows.
        checkpoint : path, optional
            File from which an interrupted training, started again by the same lines, goes on; see
            `smslib.train.fit`.
        progress : bool
            Show a bar when the session is interactive.
        """
        _, config = self._build(epochs=epochs)
        options = {"validation": self._validation, "checkpoint": checkpoint}
        self.history = fit(self.module, self._train, config, **options, progress=progress)
        return self.history

    def get_latent_representation(self) -> Float[np.ndarray, "cell latent"]:
        """Return the posterior mean of every cell, prior standard deviations.

        With Gauss-Newton inference it takes the cell's condition into account (see the notes of
        the class). ``module.encode(counts)`` needs none, nor is it as close to the posterior.
        """
        self._require_fit()
        return latents(self.module, self._cells)

    def get_elbo(self) -> float:
        """Return the mean ELBO of all cells, nats per cell; higher is better."""
        self._require_fit()
        return float(elbo(self.module, self._cells).mean())

    def get_marginal_ll(self, *, n_draws: int = 1000) -> float:
        """Return the mean IWELBO of all cells, nats per cell; higher is better."""
        self._require_fit()
        return float(iwelbo(self.module, self._cells, n_draws=n_draws).mean())

    def get_graph(self) -> pd.DataFrame:
        """Return the probability that a target (row) shifts a latent (column)."""
        self._require_fit()
        return self._by_target(self.module.prior.probabilities())

    def get_shifts(self) -> pd.DataFrame:
        """Return the expected shift of each latent by each target, prior standard deviations."""
        self._require_fit()
        with torch.no_grad():
            shifts = self.module.prior.gate() * self.module.prior.slab()
        return self._by_target(shifts.cpu().numpy())

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted model, without the data, into the folder ``path``."""
        self._require_fit()
        self.module.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike, adata: anndata.AnnData, *, device: str = "cpu") -> SMS:
        """Read a fitted model back and put it in front of ``adata``.

        Raises
        ------
        ValueError
            If ``adata`` has other genes in number, or other conditions, than the model.
        """
        module = SMSVAE.load(path, device=device)
        front = cls(adata, n_latent=module.n_latent, device=device)
        if module.n_genes != front.module.n_genes:
            raise ValueError(
                f"adata has {front.module.n_genes} genes, the saved model {module.n_genes}; "
                "pass the genes it was fitted on, in the same order"
            )
        if module.prior.conditions != front._design.conditions:
            raise ValueError("adata has other conditions than the saved model")
        front.module, front.history = module, History()
        return front

    def __repr__(self) -> str:
        """Return the sizes and whether the model is fitted."""
        state = "fitted" if self.history is not None else "not fitted: call .train()"
        design = self._design
        return (
            f"SMS({len(self._cells):,} cells, {self.module.n_genes:,} genes, "
            f"{design.n_conditions} conditions, {self.module.n_latent} latents; {state})"
        )

    def _build(self, *, epochs: int | None = None) -> tuple[SMSVAE, TrainConfig]:
        return recipes.build(self._train, self._design, epochs=epochs, **self._options)

    def _by_target(self, values: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(values, index=pd.Index(self._design.targets, name="target"))

    def _require_fit(self) -> None:
        if self.history is None:
            raise ValueError("the model is not fitted; call .train() first, or SMS.load(...)")


def _read(adata: anndata.AnnData) -> tuple:
    if _SETUP not in adata.uns:
        raise ValueError(
            "adata is not set up; call SMS.setup_anndata(adata, perturbation_key=..., control=...)"
        )
    return from_anndata(adata, **adata.uns[_SETUP])
