"""The scverse-style front: data, model, training and evaluation behind the usual verbs."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn import functional

from smslib import gauge, metrics, recipes, transfer
from smslib.data import (
    Cells,
    Design,
    checked,
    chosen_device,
    from_anndata,
    labels,
    on_design,
    split_rows,
)
from smslib.evaluate import elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.names import unknown_names
from smslib.train import History, TrainConfig, fit

if TYPE_CHECKING:
    import anndata
    import pandas as pd

__all__ = ["SMS", "stability"]

_SETUP = "_smslib"  # where setup_anndata leaves its note, in adata.uns
_FRONT = "front.json"  # what SMS.save adds to the two files of SMSVAE.save
# What that remembers of a front, under these names without the underscore.
_REMEMBERED = ("_genes", "_setup", "_seed", "_trained_on", "_thresholds")
_STILL_OPEN = 0.9  # gates start at .993
_N_LISTED = 5


class SMS:
    """A sparse mechanism shift model of one screen.

    Parameters
    ----------
    adata : AnnData
        Prepared by `setup_anndata`.
    method : {"svae+", "svae", "ivae", "vae", "beta-vae", "cpa-vae", "sams-vae"}
    n_latent : int
    recipe : {"screen", "smslib", "corrected", "paper"} or Recipe
        How it is built and trained, `smslib.recipes.RECIPES`: for real screens, for the
        simulations, and as released with and without its slips mended.
    sparsity : float, optional
        As in `smslib.recipes.build`; of sVAE+ by the recipe "screen" it is alpha, the number of
        targets by default. `get_thresholds` says what it means for each target.
    seed : int
        Of the split, the initial weights, the batches and the draws.
    device : str
        As in `smslib.data.chosen_device`.

    Raises
    ------
    ValueError
        If `setup_anndata` was not called, the counts do not pass `smslib.data.from_anndata`, which
        also refuses cells without a condition, or no condition has five cells.

    Notes
    -----
    Where the recipe has Gauss-Newton inference (``"screen"``, ``"smslib"``), q is ``q(z | x, c)``:
    steps move the encoder's mean towards the mode of ``p(z | x, c)``, whose prior is that of the
    cell's condition. Latents, ELBO and IWELBO of a cell then depend on its label, and a label
    that is wrong pulls the cell's latents towards the wrong shift. In other recipes q is
    ``q(z | x)``.

    There are no covariates. Where batches differ and conditions are unevenly spread over them, fit
    one batch at a time and compare the shifts of two fits (`smslib.programs.recurrence`).

    Functions of the library that take a model and cells, such as `smslib.programs.jacobian`, are
    given ``model.module``, ``model.cells`` and ``genes=model.genes``: the cells of an AnnData may
    have their genes in another order.

    The counts are held densely, 4 bytes for each cell and gene, and twice while training.

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
        recipe: str | recipes.Recipe = "screen",
        sparsity: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        setup = _setup_of(adata)
        if setup is None:
            raise ValueError(
                "adata is not set up; call SMS.setup_anndata(adata, perturbation_key=..., "
                "control=...)"
            )
        cells, design = from_anndata(adata, **setup)
        self._stand(adata, cells.to(chosen_device(device)), setup, tuple(adata.var_names))
        self.history: History | None = None
        self._seed, self._trained_on = int(seed), self._digest()
        train = self._cells[self._split()[0]]
        self.module, self._config = recipes.build(
            train,
            design,
            method=method,
            recipe=recipe,
            n_latent=n_latent,
            sparsity=sparsity,
            seed=self._seed,
        )
        self.module.to(self._cells.device)
        self._training = self._config
        self._thresholds = self._asked_of(train, design)

    @staticmethod
    def setup_anndata(
        adata: anndata.AnnData,
        *,
        perturbation_key: str,
        control: str | int,
        layer: str | None = None,
        sep: str = "+",
    ) -> None:
        """Check the counts and note in ``adata.uns`` where counts and conditions are.

        Parameters
        ----------
        adata, perturbation_key, control, layer, sep
            As in `smslib.data.from_anndata`, which also lists what is refused.
        """
        note = {"perturbation_key": perturbation_key, "control": str(control), "sep": sep}
        checked(adata, **note, layer=layer)
        adata.uns[_SETUP] = note if layer is None else {**note, "layer": layer}

    def train(
        self,
        *,
        epochs: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
        **training: object,
    ) -> History:
        """Fit the model and return the history.

        The weights kept are those of the recipe: with "paper" the last ones, otherwise the best
        on the tenth of the cells that validate.

        Parameters
        ----------
        epochs : int, optional
            Instead of the recipe's number; the warm-up keeps its share of them.
        checkpoint : path, optional
            File from which an interrupted training, started again by the same lines, goes on; see
            `smslib.train.fit`.
        progress : bool
            Show a bar when the session is interactive.
        **training
            Other fields of `smslib.train.TrainConfig`, such as ``learning_rate`` or
            ``max_grad_norm``.

        Raises
        ------
        ValueError
            If the model stands in front of other cells than those it was made for, or comes from
            `adapt`.
        FloatingPointError
            At the first loss that is not finite.
        """
        config = replace(_shortened(self._config, epochs), **training)
        train, validation = (self._cells[rows] for rows in self._rows())
        options = {"validation": validation, "checkpoint": checkpoint, "progress": progress}
        self.history = fit(self.module, train, config, **options)
        self._training = config
        self._thresholds = self._asked_of(train, self.module.prior.design)
        return self.history

    @property
    def cells(self) -> Cells:
        """The cells that the model stands in front of, with genes and conditions as it knows them.

        For the functions of the library that take a model and cells, `module`.
        """
        return self._cells

    @property
    def genes(self) -> tuple[str, ...]:
        """The genes of the model, in its order."""
        return tuple(self._genes)

    @property
    def validation_indices(self) -> Int[np.ndarray, " cell"]:
        """Positions of the cells that are not trained on: a tenth of every condition.

        Raises
        ------
        ValueError
            As in `train`.
        """
        return self._rows()[1].numpy()

    def get_latent_representation(
        self, adata: anndata.AnnData | None = None
    ) -> Float[np.ndarray, "cell latent"]:
        """Return the posterior mean of every cell, prior standard deviations.

        With Gauss-Newton inference it takes the cell's condition into account (see the notes of
        the class). ``module.encode(counts)`` needs none, nor is it as close to the posterior.

        Parameters
        ----------
        adata : AnnData, optional
            Other cells of conditions and genes that the model knows.
        """
        self._require_fit()
        return latents(self.module, self._read(adata))

    def get_elbo(self, adata: anndata.AnnData | None = None) -> float:
        """Return the mean ELBO, nats per cell; higher is better.

        Gates are integrated out, or drawn where the recipe draws them ("paper", "corrected").

        Parameters
        ----------
        adata : AnnData, optional
            The cells; all of the model's by default, most of which it was trained on. To compare
            models: ``model.get_elbo(model.adata[model.validation_indices])``.
        """
        self._require_fit()
        return float(elbo(self.module, self._read(adata)).mean())

    def get_marginal_ll(
        self, adata: anndata.AnnData | None = None, *, n_draws: int = 1000
    ) -> float:
        """Return the mean IWELBO, nats per cell; higher is better. Gates are open or shut.

        Parameters
        ----------
        adata : AnnData, optional
            As in `get_elbo`.
        n_draws : int
        """
        self._require_fit()
        return float(iwelbo(self.module, self._read(adata), n_draws=n_draws).mean())

    def get_graph(self) -> pd.DataFrame:
        """Return the gates: one for each target (row) and latent (column), between 0 and 1.

        A gate is the model's own probability that the target moves the latent. It is a cut at the
        size of the shift (`get_thresholds`) rather than a measure of confidence; for that see
        `stability`. Gates start open; it warns if none has begun to close.
        """
        self._require_fit()
        gates = self._by_target(self.module.prior.probabilities())
        if self.module.prior.gate.asked() > 0 and gates.to_numpy().min(initial=1.0) > _STILL_OPEN:
            warnings.warn(
                "every gate is open, as before the training; train for more epochs, or give a "
                "larger sparsity",
                stacklevel=2,
            )
        return gates

    def get_shifts(self) -> pd.DataFrame:
        """Return the expected shift of each latent by each target, prior standard deviations."""
        self._require_fit()
        with torch.no_grad():
            shifts = self.module.prior.gate() * self.module.prior.slab()
        return self._by_target(shifts.cpu().numpy())

    def get_sparsest_axes(self, *, alpha: float | None = None) -> gauge.Frame:
        """Return the axes in which the model's cells need the fewest shifts.

        A fit without sparsity has axes by chance, and one with it may not have settled them.
        ``axes.of(model.get_latent_representation())`` are the latents in these; to read shifts as
        well, `smslib.gauge` has the means and the evidence. Conditions with one target count.

        Parameters
        ----------
        alpha : float, optional
            Sparsity as that of sVAE+, above 1. The default is `smslib.recipes.alpha_by_cells`.

        Raises
        ------
        ValueError
            If no condition has one target, or as `smslib.gauge.sparsest`.
        """
        design, condition = self.module.prior.design, self.cells.condition.cpu().numpy()
        single = np.flatnonzero((design.matrix.cpu() != 0).sum(1).numpy() == 1)
        if not len(single):
            raise ValueError(
                "no condition of this screen has one target alone; expected some, for axes are "
                "chosen by what single targets move"
            )
        codes = self.get_latent_representation()
        means, n_cells = gauge.target_means(codes, condition, single)
        if alpha is None:
            alpha = recipes.alpha_by_cells(self.cells, design)
        return gauge.sparsest(means, n_cells, alpha=alpha)

    def get_thresholds(self) -> pd.Series:
        """Return the shift beyond which a gate stays open, prior standard deviations, per target.

        It is ``sqrt(2 L / n)`` for the ``n`` cells with the target that the model has learned
        from, where the gate asks ``L`` nats of evidence: ``sqrt(4 (alpha - 1) / n)`` for sVAE+.
        That of SAMS-VAE is larger, because a shift has a price of its own there; it is one of the
        mean of the target's cells, before the prior shrinks it. A training with the weight
        ``beta`` of the KL term counts ``beta n`` cells. Zero for methods without sparsity.
        """
        import pandas as pd

        return pd.Series(
            self._thresholds,
            index=pd.Index(self.module.prior.design.targets, name="target"),
            name="threshold",
        )

    def adapt(
        self, adata: anndata.AnnData, *, gates: Literal["learned", "open"] = "learned"
    ) -> SMS:
        """Learn the shifts of perturbations that the model has never seen, and nothing else.

        Parameters
        ----------
        adata : AnnData
            Cells of new conditions, of known ones as well if wanted; controls are not needed. A
            label is new if no cell of the training has it. One that is made of known targets alone
            has the sum of their shifts, and nothing to learn; any other is one new target, which
            labels of the same parts share (E, E+control, control+E).
        gates : {"learned", "open"}
            Which latents a new target moves: those for which its cells outweigh the sparsity, or
            all of them, as in the paper. See `smslib.transfer.adapt`.

        Returns
        -------
        SMS
            In front of ``adata``, with encoder and decoder unchanged; its gates are all fixed. It
            can be asked and saved, not trained.

        Raises
        ------
        ValueError
            If there is no new condition, or ``adata`` lacks genes of the model.
        """
        self._require_fit()
        setup = _setup_of(adata) or self._setup
        known = self.module.prior.design
        new = sorted(set(labels(adata, setup["perturbation_key"])) - set(known.conditions))
        if not new:
            raise ValueError(
                f"adata has no condition beyond the {known.n_conditions} that the model knows; "
                "get_latent_representation(adata) takes cells of those"
            )
        design = _extended(known, new, setup)
        cells = _aligned(adata, self._genes, design, setup).to(self.module.device)
        front = copy.copy(self)
        front._stand(adata, cells, setup, self._genes)
        options = {"gates": gates, "beta": self._training.beta}
        front.module = transfer.adapt(self.module, cells, design=design, **options)
        asked = self._asked_of(cells, design)[known.n_targets :]
        asked = asked if gates == "learned" else [0.0] * len(asked)
        front._thresholds = [*self._thresholds, *asked]
        front._trained_on = None
        return front

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted model, its genes and its training, without the data, into a folder.

        Raises
        ------
        OSError
            If they cannot be written.
        """
        self._require_fit()
        note = {key.lstrip("_"): getattr(self, key) for key in _REMEMBERED}
        note |= {"config": asdict(self._config), "training": asdict(self._training)}
        note |= {"history": self.history.rows, "best_epoch": self.history.best_epoch}
        self.module.save(path, notes={_FRONT: note})

    @classmethod
    def load(cls, path: str | os.PathLike, adata: anndata.AnnData, *, device: str = "cpu") -> SMS:
        """Read a fitted model back and put it in front of cells of conditions that it knows.

        Parameters
        ----------
        path : path
            Written by `save`.
        adata : AnnData
            The same cells or others. Genes are found by name, in any order. It need not be set up:
            the model remembers the names of column, control and layer.
        device : str
            As in `smslib.data.chosen_device`.

        Raises
        ------
        FileNotFoundError
            If ``path`` holds no model, or one without its genes.
        KeyError
            If ``adata`` has conditions that the model does not know; `adapt` takes those.
        ValueError
            If ``adata`` lacks genes of the model, or the files are damaged or do not belong
            together.
        """
        module, note = SMSVAE.load(path, device=chosen_device(device)), _noted(path)
        setup = _setup_of(adata) or note["_setup"]
        cells = _aligned(adata, note["_genes"], module.prior.design, setup)
        front = object.__new__(cls)
        vars(front).update(note)
        front._stand(adata, cells.to(module.device), setup, note["_genes"])
        front.module = module
        return front

    def __repr__(self) -> str:
        """Return the sizes and whether the model is fitted."""
        state = "fitted" if self.history is not None else "not fitted: call .train()"
        return (
            f"SMS({len(self._cells):,} cells, {self.module.n_genes:,} genes, "
            f"{self.module.prior.design.n_conditions} conditions, {self.module.n_latent} latents; "
            f"{state})"
        )

    def _stand(
        self,
        adata: anndata.AnnData,
        cells: Cells,
        setup: Mapping[str, str],
        genes: Sequence[str],
    ) -> None:
        """Stand in front of these cells."""
        self.adata, self._cells = adata, cells
        self._setup = {key: str(value) for key, value in setup.items()}
        self._genes = list(genes)

    def _asked_of(self, cells: Cells, design: Design) -> list[float]:
        """Return the shift of each target of a design that these cells ask an open gate for."""
        seen = design.cells_per_target(cells.condition).double()
        return self.module.prior.thresholds(self._training.beta * seen).tolist()

    def _digest(self) -> str:
        """Return what tells these cells, in this order, from others: name, label and UMIs."""
        label = self.adata.obs[self._setup["perturbation_key"]].astype(str)
        umis = self._cells.library.squeeze(1).tolist()
        rows = list(zip(self.adata.obs_names, label, umis, strict=True))
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def _rows(self) -> tuple[Int[torch.Tensor, " cell"], ...]:
        """Return which cells train and which validate."""
        if self._trained_on is None:
            raise ValueError(
                "the model comes from adapt, which trained it on none of these cells; to train on "
                "them, make a new model, SMS(adata)"
            )
        if self._digest() != self._trained_on:
            raise ValueError(
                "adata holds other cells, in another order or under other labels, than those that "
                "the model was made for; load it in front of those, or make a new model"
            )
        return self._split()

    def _split(self) -> tuple[Int[torch.Tensor, " cell"], ...]:
        rows = split_rows(self._cells.condition, (0.9, 0.1), seed=self._seed)
        if not len(rows[1]):
            raise ValueError(
                f"of {len(self._cells)} cells none is left to validate by, because no condition "
                "has five; merge conditions, or fit without validation (smslib.train.fit)"
            )
        return rows

    def _read(self, adata: anndata.AnnData | None) -> Cells:
        if adata is None:
            return self._cells
        setup = _setup_of(adata) or self._setup
        cells = _aligned(adata, self._genes, self.module.prior.design, setup)
        return cells.to(self.module.device)

    def _by_target(self, values: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        targets = self.module.prior.design.targets
        return pd.DataFrame(values, index=pd.Index(targets, name="target"))

    def _require_fit(self) -> None:
        if self.history is None:
            raise ValueError("the model is not fitted; call .train() first, or SMS.load(...)")


def stability(models: Sequence[SMS], *, threshold: float = 0.5) -> pd.DataFrame:
    """Return in which share of fits a target (row) moves a latent (column, of the first fit).

    Latents come in any order and with any sign, so those of each other fit are matched to those of
    the first, one to one, by the absolute correlation over the cells.

    Parameters
    ----------
    models : sequence of SMS
        Fits of the same cells that differ by their seed.
    threshold : float
        A gate above it is open.

    Returns
    -------
    DataFrame, (n_targets, n_latent)
        Shares of all fits, the first included.

    Raises
    ------
    ValueError
        If there are fewer than two, or they differ in cells, targets or number of latents.
    """
    import pandas as pd

    if len(models) < 2:
        raise ValueError(f"models holds {len(models)}; expected two fits or more to compare")
    graphs = [model.get_graph() > threshold for model in models]
    codes = [model.get_latent_representation() for model in models]
    if any(not graph.index.equals(graphs[0].index) for graph in graphs):
        raise ValueError("the models have other targets; expected fits of the same screen")
    if len(shapes := {code.shape for code in codes}) > 1:
        raise ValueError(
            f"the models have (cells, latents) {sorted(shapes)}; expected the same of all"
        )
    if len({model._digest() for model in models}) > 1:
        raise ValueError(
            "the models stand in front of other cells, or of the same in another order; load them "
            "in front of one adata, SMS.load(path, adata)"
        )
    partners = [metrics.match_latents(codes[0], code).cols for code in codes]
    shares = np.mean([g.to_numpy()[:, p] for g, p in zip(graphs, partners, strict=True)], axis=0)
    return pd.DataFrame(shares, index=graphs[0].index)


def _setup_of(adata: anndata.AnnData) -> Mapping[str, str] | None:
    return adata.uns.get(_SETUP)


def _shortened(config: TrainConfig, epochs: int | None) -> TrainConfig:
    """Return the training in other epochs, with a warm-up of the same share."""
    if epochs is None:
        return config
    warmup = round(epochs * config.warmup_epochs / config.epochs)
    return replace(config, epochs=epochs, warmup_epochs=max(warmup, min(1, config.warmup_epochs)))


def _extended(known: Design, new: Sequence[str], setup: Mapping[str, str]) -> Design:
    """Return the design with new labels: sums of known targets, or one new target each.

    Labels of the same parts share it: E, E+control and control+E.
    """
    parts = [frozenset(label.split(setup["sep"])) - {setup["control"]} for label in new]
    own: dict[frozenset[str], str] = {}
    for label, found in zip(new, parts, strict=True):
        if not found <= set(known.targets):
            own.setdefault(found, *found if len(found) == 1 else (label,))
    targets = (*known.targets, *own.values())
    doses = known.matrix.new_zeros(len(new), len(targets))
    for row, found in zip(doses, parts, strict=True):
        perturbed = [own[found]] if found in own else found
        row[[targets.index(target) for target in perturbed]] = 1.0
    matrix = torch.cat([functional.pad(known.matrix, (0, len(own))), doses])
    return Design((*known.conditions, *new), targets, matrix)


def _aligned(
    adata: anndata.AnnData, genes: Sequence[str], design: Design, setup: Mapping[str, str]
) -> Cells:
    """Read the cells of a known design with the genes of the model, in its order."""
    there = set(adata.var_names)
    if missing := [gene for gene in genes if gene not in there]:
        first = unknown_names("gene", missing[:_N_LISTED], adata.var_names)
        raise ValueError(
            f"adata lacks {len(missing):,} of the {len(genes):,} genes that the model was fitted "
            f"on: {first}"
        )
    if tuple(adata.var_names) != tuple(genes):
        adata = adata[:, list(genes)]
    where = {key: setup.get(key) for key in ("perturbation_key", "layer")}
    return on_design(adata, design, **where)


def _weights_of(path: str | os.PathLike) -> str:
    """Return the checksum of the weights that a saved model declares."""
    return json.loads(Path(path, "config.json").read_text())["weights_sha256"]


def _noted(path: str | os.PathLike) -> dict[str, Any]:
    """Return what `SMS.save` wrote beside the model, checked."""
    file = Path(path, _FRONT)
    if not file.exists():
        raise FileNotFoundError(
            f"{path} holds a model without its genes ({_FRONT} is missing); it was written by "
            "SMSVAE.save, and SMSVAE.load reads it"
        )
    try:
        note = json.loads(file.read_text())
        if note["weights_sha256"] != _weights_of(path):
            raise ValueError("its weights are those of another model")
        if "thresholds" not in note:  # of before they, and the training as it was made, were kept
            note["thresholds"] = [math.sqrt(2.0 * note["asked"] / n) for n in note["seen"]]
        front = {key: note[key.lstrip("_")] for key in _REMEMBERED}
        front["_config"] = TrainConfig(**note["config"])
        front["_training"] = TrainConfig(**note.get("training", note["config"]))
        front["history"] = History(best_epoch=note["best_epoch"])
        front["history"].load_state_dict({"rows": note["history"]})
        return front
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); save the model or copy its "
            "folder again"
        ) from error
