"""Sparse mechanism shift models of perturbation screens (sVAE+ and its relatives)."""

__version__ = "0.1.0"
