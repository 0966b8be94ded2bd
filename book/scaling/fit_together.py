"""Fit one model on several processes: ``torchrun --nproc-per-node 4 fit_together.py ...``."""

import argparse
import os

import anndata
import torch
from torch import distributed

from smslib import data, recipes
from smslib.train import fit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("screen", help="an .h5ad with raw counts and obs['target']")
parser.add_argument("model", help="folder to save the model in")
parser.add_argument("--control", default="non-targeting")
parser.add_argument("--epochs", type=int)
given = parser.parse_args()

on_gpu = torch.cuda.is_available()
device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
if on_gpu:
    torch.cuda.set_device(device)
distributed.init_process_group("nccl" if on_gpu else "gloo")

screen = anndata.read_h5ad(given.screen)
cells, design = data.from_anndata(screen, perturbation_key="target", control=given.control)
model, config = recipes.build(cells, design, epochs=given.epochs)
fit(model.to(device), cells.to(device), config, group=distributed.group.WORLD)
if distributed.get_rank() == 0:
    model.save(given.model)
distributed.destroy_process_group()
