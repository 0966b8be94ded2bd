"""Named ways to fit every method: as the released code does it, with its slips mended, and ours.

A `Recipe` is data. `CHANGES` names the single differences between the recipes, so that a benchmark
can go from one to the next by one change at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from smslib.data import Cells, Design
from smslib.model import SMSVAE
from smslib.priors import LogitGate
from smslib.train import TrainConfig

__all__ = ["CHANGES", "CORRECTIONS", "RECIPES", "Recipe", "alpha_by_cells", "build", "strength_at"]

_BETA = 10.0  # of beta-VAE; the middle of the paper's grid {8, 10, 30}
# sVAE+ keeps the edges whose shift exceeds sqrt(4 (alpha - 1) / n) prior standard deviations,
# where n cells see the target (the equilibrium of data and prior, derived in the book).
# alpha = .45 n puts that threshold at 1.34 whatever n is, for the target of median size.
_ALPHA_PER_CELL = 0.45
_WARMUP_SHARE = 0.3  # gates that close before the axes are sorted do not open again
_LARGEST_IN_GRID = 100.0  # of alpha and of lambda (paper, Table 3)


@dataclass(frozen=True)
class Recipe:
    """What a fit needs besides method, cells and design.

    Parameters
    ----------
    network : dict
        Options of `smslib.model.SMSVAE`.
    train : TrainConfig
        Whatever they are here, `build` sets ``seed``, ``beta``, ``warm_penalty`` and
        ``loss_scale``, and where there are ``steps`` also ``batch_size``, ``epochs`` and
        ``warmup_epochs``; to choose these, change what it returns.
    standardise : bool
        Whether the encoder sees log counts of mean 0 and variance 1.
    equal_scale : bool
        Whether every method's loss is summed over the screen, or that of sVAE+ alone (as
        released), which matters under a large Adam eps.
    open_ivae : bool
        Whether iVAE has gamma = 1 (paper), or gates without a penalty (as released).
    steps : int, optional
        Gradient steps of a fit: batch size, epochs and warm-up then follow the number of cells
        (batches of a seventieth of the screen, 128 to 512 cells; a warm-up of .3 of the epochs),
        so that small screens are trained as long.
    fewest_epochs : int
        Of a fit of so many steps: a large screen takes more steps than those.
    sparsity : {"grid", "cells", "targets"}
        Where none is given: 100, the largest of the paper's grid, as alpha or as lambda of
        ``lambda * mean(gate)`` in a loss per cell; alpha in proportion to the cells per target;
        or alpha = the number of targets (paper, App. E.4). With the latter two sVAE is given the
        strength that keeps the same edges.
    """

    network: Mapping[str, object] = field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    standardise: bool = False
    equal_scale: bool = True
    open_ivae: bool = True
    steps: int | None = None
    fewest_epochs: int = 1
    sparsity: Literal["grid", "cells", "targets"] = "cells"

    def with_network(self, **options: object) -> Recipe:
        """Return a copy with other options of the model."""
        return replace(self, network={**self.network, **options})

    def with_train(self, **options: object) -> Recipe:
        """Return a copy with other options of the training, but for those that `build` sets."""
        return replace(self, train=replace(self.train, **options))


# Genentech/sVAE on scvi-tools 0.18.0, setting by setting.
_PAPER = Recipe(
    network={"norm": "batch", "dropout": 0.1, "activation": "relu", "estimator": "sampled"},
    train=TrainConfig(
        learning_rate=1e-3,
        schedule="constant",
        adam_eps=0.01,
        weight_decay=1e-6,
        warmup_epochs=50,
        patience=45,
        keep="last",
    ),
    equal_scale=False,
    open_ivae=False,
    sparsity="grid",
)


def _our_training(recipe: Recipe) -> Recipe:
    return replace(recipe, steps=7000).with_train(
        learning_rate=8e-3,
        schedule="cosine",
        adam_eps=1e-8,
        weight_decay=0.0,
        patience=None,
        optimizer="muon",
        muon_weight_decay=0.1,
    )


# In the order in which the benchmark makes them.
CHANGES: Mapping[str, Callable[[Recipe], Recipe]] = MappingProxyType(
    {
        "loss-scale": lambda recipe: replace(recipe, equal_scale=True),
        "open-ivae": lambda recipe: replace(recipe, open_ivae=True),
        "best-weights": lambda recipe: recipe.with_train(keep="best"),
        "closed-form-gates": lambda recipe: recipe.with_network(estimator="expected"),
        "no-norm": lambda recipe: recipe.with_network(norm="none", dropout=0.0),
        "leaky": lambda recipe: recipe.with_network(activation="leaky_relu"),
        "standardise": lambda recipe: replace(recipe, standardise=True),
        "training": _our_training,
        "networks": lambda recipe: recipe.with_network(n_layers_decoder=3, n_hidden_encoder=256),
        "newton": lambda recipe: recipe.with_network(newton=True).with_train(encoder_share=0.45),
        "weighted": lambda recipe: recipe.with_train(n_draws=5, weighted_share=0.3),
        "alpha-per-cell": lambda recipe: replace(recipe, sparsity="cells"),
    }
)
# The slips of the released code among them: the first changes to be made.
CORRECTIONS = ("loss-scale", "open-ivae", "best-weights")


def _changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    for name in changes:
        if name not in CHANGES:
            raise ValueError(f"unknown change {name!r}; expected some of {list(CHANGES)}")
        recipe = CHANGES[name](recipe)
    return recipe


def _for_screens(recipe: Recipe) -> Recipe:
    """Make the recipe of the simulations one for real screens, whose shifts are smaller.

    Far fewer steps decide the rest: Muon doubles what a step costs, Gauss-Newton from the middle
    on adds a third, and neither has a better validation ELBO to show for it there; the weighted
    bound doubles the cost of a fit for .1 nats of IWELBO.
    """
    shorter = replace(recipe, steps=1680, fewest_epochs=24, sparsity="targets")
    return shorter.with_train(optimizer="adam", encoder_share=0.8, n_draws=1)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "paper": _PAPER,
        "corrected": _changed(_PAPER, CORRECTIONS),
        "smslib": _changed(_PAPER, tuple(CHANGES)),
        "screen": _for_screens(_changed(_PAPER, tuple(CHANGES))),
    }
)


def build(
    cells: Cells,
    design: Design,
    *,
    method: str = "svae+",
    recipe: str | Recipe = "smslib",
    changes: Sequence[str] = (),
    n_latent: int = 15,
    sparsity: float | None = None,
    beta: float | None = None,
    seed: int = 0,
    epochs: int | None = None,
) -> tuple[SMSVAE, TrainConfig]:
    """Return an untrained model and how to train it.

    Parameters
    ----------
    cells : Cells
        The training cells: the strength of the sparsity depends on how many there are.
    design : Design
    method : {"vae", "beta-vae", "ivae", "svae", "svae+", "cpa-vae", "sams-vae"}
    recipe : {"paper", "corrected", "smslib", "screen"} or Recipe
        As released; its slips mended; ours for the simulations; ours for real screens.
    changes : sequence of str
        Keys of `CHANGES`, made to the recipe in this order.
    n_latent : int
    sparsity : float, optional
        alpha of sVAE+. Of sVAE: lambda of ``lambda * mean(gate)`` in a loss per cell where the
        recipe's sparsity is "grid", otherwise nats per open gate. The default of "cells" puts the
        smallest shift that keeps its edge at 1.34 prior standard deviations, for a target with as
        many cells as the median one. Of SAMS-VAE: the prior probability of an edge, .01 by
        default; there more is denser.
    beta : float, optional
        Of beta-VAE; 10 by default.
    seed : int
        Of the initial weights, the batches and the draws.
    epochs : int, optional
        Instead of the recipe's own number.

    Returns
    -------
    model : SMSVAE
    config : TrainConfig

    Raises
    ------
    ValueError
        If recipe, change or method is unknown, or beta is given to another method.
    """
    if beta is not None and method != "beta-vae":
        raise ValueError(
            f"beta is {beta}, but {method!r} has none; leave it out or use 'beta-vae'"
        )
    plan = _changed(_named(recipe), changes)
    model = SMSVAE.preset(
        method,
        design,
        cells.n_genes,
        n_latent=n_latent,
        sparsity=_strength(plan, cells, design, method, n_latent, sparsity),
        seed=seed,
        **plan.network,
    )
    if method == "ivae" and not plan.open_ivae:
        model.prior.gate = LogitGate(design.n_targets, n_latent)
    if plan.standardise:
        model.standardise(cells)
    return model, _schedule(plan, cells, method=method, beta=beta, seed=seed, epochs=epochs)


def _named(recipe: str | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; expected one of {sorted(RECIPES)}")
    return RECIPES[recipe]


def _schedule(
    plan: Recipe,
    cells: Cells,
    *,
    method: str,
    beta: float | None,
    seed: int,
    epochs: int | None,
) -> TrainConfig:
    """Return the training of one method."""
    summed = plan.equal_scale or method == "svae+"
    return replace(
        plan.train,
        seed=seed,
        **_length(plan, len(cells), epochs),
        beta=_beta(method, beta),
        warm_penalty=plan.sparsity != "grid" or method == "svae+",
        loss_scale="screen" if summed else "cell",
    )


def _beta(method: str, beta: float | None) -> float:
    """Return the weight of the KL term."""
    if method != "beta-vae":
        return 1.0
    return _BETA if beta is None else beta


def _length(plan: Recipe, n_cells: int, epochs: int | None) -> dict[str, int]:
    """Return batch size, epochs and warm-up."""
    if plan.steps is None:
        return {"epochs": plan.train.epochs if epochs is None else epochs}
    batch_size = min(512, max(128, n_cells // 70))
    if epochs is None:
        enough = math.ceil(plan.steps * min(batch_size, n_cells) / n_cells)
        epochs = max(plan.fewest_epochs, enough)
    warmup = math.ceil(_WARMUP_SHARE * epochs)
    return {"batch_size": batch_size, "epochs": epochs, "warmup_epochs": warmup}


def _strength(
    plan: Recipe,
    cells: Cells,
    design: Design,
    method: str,
    n_latent: int,
    sparsity: float | None,
) -> float | None:
    """Return the sparsity in the unit of the method's gate; None leaves it to the method."""
    if method not in ("svae", "svae+"):
        return sparsity
    if plan.sparsity != "grid":
        return strength_at(_alpha(plan, cells, design), method) if sparsity is None else sparsity
    strength = _LARGEST_IN_GRID if sparsity is None else sparsity
    per_gate = len(cells) / max(1, design.n_targets * n_latent)  # 1: of controls alone
    return strength if method == "svae+" else strength * per_gate


def strength_at(alpha: float, method: str) -> float | None:
    """Return the sparsity by which a method keeps the edges that sVAE+ keeps at an alpha.

    Parameters
    ----------
    alpha : float
    method : str

    Returns
    -------
    float or None
        Of sVAE, nats per open gate; None for a method whose sparsity is another one, or none.
    """
    return {"svae+": alpha, "svae": 2.0 * (alpha - 1.0)}.get(method)


def alpha_by_cells(cells: Cells, design: Design) -> float:
    """Return the alpha of sVAE+ that keeps shifts above 1.34 prior standard deviations.

    Of the target with the median number of cells; of others the more, the fewer cells they have.

    Parameters
    ----------
    cells : Cells
    design : Design

    Returns
    -------
    float
        At least 2: at 1 the prior is flat, and gates stay open.
    """
    median = float(design.cells_per_target(cells.condition).median())
    return max(2.0, _ALPHA_PER_CELL * median)


def _alpha(plan: Recipe, cells: Cells, design: Design) -> float:
    """Return the alpha of a recipe that adapts it to the screen."""
    if plan.sparsity == "targets":
        return float(max(2, design.n_targets))  # at 1 the prior is flat, and gates stay open
    return alpha_by_cells(cells, design)
