"""Fits shared out among processes: ``torchrun --nproc-per-node N curves.py FOLDER``.

The draws of z are the one thing that a fit on several processes cannot have in common with a fit
on one. Here they are fixed.
"""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import distributed

from smslib import train
from smslib.data import Cells, Design
from smslib.model import SMSVAE
from smslib.train import TrainConfig, fit

DESIGN = Design.single_target(["a", "b", "c"])
# 61 cells in batches of 16: parts of 8 and 8 cells, then of 7 and 6.
CONFIG = TrainConfig(epochs=4, batch_size=16, warmup_epochs=2)
ONE_LEFT = replace(CONFIG, batch_size=60)  # its last batch has a single cell for two processes
STILL = replace(CONFIG, epochs=40, patience=2, learning_rate=0.0)
FITS = {
    "svae+": ("svae+", {}, CONFIG),
    "vae": ("vae", {}, CONFIG),
    "a process without cells": ("svae+", {}, ONE_LEFT),
    "our recipe's parts": (
        "svae+",
        {"newton": True},
        replace(CONFIG, optimizer="muon", n_draws=3, weighted_share=0.5, max_grad_norm=1.0),
    ),
    "svae": ("svae", {"sparsity": 5.0}, CONFIG),
    "stands still": ("svae+", {}, STILL),
}


def cells(n_cells, *, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.full((n_cells, 6), 9.0), generator=generator) + 1
    return Cells(counts, torch.arange(n_cells) % DESIGN.n_conditions)


def curves(group):
    """Return epochs and final weights of every fit."""
    return {name: fitted(*how, group) for name, how in FITS.items()}


def fitted(method, options, config, group):
    model = SMSVAE.preset(method, DESIGN, 6, n_latent=2, n_hidden=8, **options)
    training, validation = cells(61, seed=0), cells(20, seed=1)
    with same_draws():
        history = fit(model, training, config, validation=validation, group=group, progress=False)
    weights = torch.cat([value.flatten() for value in model.state_dict().values()])
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    return {"rows": rows, "best": history.best_epoch, "weights": weights.tolist()}


@contextlib.contextmanager
def same_draws():
    """Let every cell draw the same numbers, whichever process it is in."""
    with (
        mock.patch.object(torch, "randn_like", lambda like: _draws(*like.shape)),
        mock.patch.object(torch, "randn", lambda *size, **_: _draws(*size)),
    ):
        yield


def _draws(*size):
    of_latent = torch.linspace(-1.0, 1.0, size[-1])
    of_draw = torch.linspace(0.5, 1.5, size[0])[:, None, None] if len(size) == 3 else 1.0
    return (of_draw * of_latent).expand(size)


def refusal(group, n_cells, **options):
    model = SMSVAE.preset("svae+", DESIGN, 6, n_latent=2, n_hidden=8, **options)
    try:
        fit(model, cells(n_cells, seed=0), CONFIG, group=group, progress=False)
    except ValueError as error:
        return str(error)


def seeds(group):
    """Return the seeds of the draws of a fit."""
    with mock.patch.object(train, "seeded", wraps=train.seeded) as seeded:
        fitted("svae+", {}, replace(CONFIG, epochs=1), group)
    return [call.args[0] for call in seeded.call_args_list]


def main(folder):
    distributed.init_process_group("gloo")
    group, rank = distributed.group.WORLD, distributed.get_rank()
    torch.set_num_threads(1)
    told = {
        "curves": curves(group),
        "seeds": seeds(group),
        "refused": {
            "cells": refusal(group, 61 + rank),
            "norm": refusal(group, 61, norm="batch"),
        },
    }
    (folder / f"{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
