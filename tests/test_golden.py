"""Short fits whose course was recorded: a change of numbers has to be seen and meant.

`python tests/test_golden.py` records them anew; look at the difference before committing it.
"""

import csv
from pathlib import Path

import pytest
import torch

from smslib.evaluate import iwelbo
from smslib.model import SMSVAE
from smslib.priors import METHODS
from smslib.simulate import sparse_shift
from smslib.train import TrainConfig, fit

FOLDER = Path(__file__).parent / "golden"
COLUMNS = ("epoch", "reconstruction", "kl", "penalty", "iwelbo")
# Rounding differs between processors, and training amplifies it.
TOLERANCE = {"rel": 2e-3, "abs": 2e-3}
# Every method by its encoder, and one with Gauss-Newton steps in the second half of the fit. Muon
# is left out: it rounds to 8 bits, and so differently on every processor.
COURSES = {
    **{method: (method, {}) for method in METHODS},
    "svae+-newton": ("svae+", {"newton": True}),
}


def course(name):
    """One row per epoch, and the importance-weighted bound at the end."""
    method, options = COURSES[name]
    screen = sparse_shift(
        n_cells_per_condition=30, n_targets=10, n_latent=4, n_genes=40, seed=0, as_released=True
    )
    sizes = {"n_latent": 4, "n_hidden": 16, "seed": 0}
    model = SMSVAE.preset(method, screen.design, 40, **sizes, **options)
    config = TrainConfig(
        epochs=15, batch_size=50, learning_rate=1e-2, warmup_epochs=3, encoder_share=0.5
    )
    rows = fit(model, screen.cells, config, progress=False).rows
    bound = float(iwelbo(model, screen.cells, n_draws=50).mean())
    return [{**row, "iwelbo": bound if row is rows[-1] else ""} for row in rows]


def recorded(name):
    with (FOLDER / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", sorted(COURSES))
def test_the_course_of_a_fit(name):
    expected, actual = recorded(name), course(name)
    assert len(actual) == len(expected)
    for then, now in zip(expected, actual, strict=True):
        for column in COLUMNS:
            if then[column]:
                assert now[column] == pytest.approx(float(then[column]), **TOLERANCE), column


def test_no_file_is_left_over():
    assert {path.stem for path in FOLDER.iterdir()} == set(COURSES)


def test_steps_change_nothing_before_they_begin():
    before, after = recorded("svae+"), recorded("svae+-newton")
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [True] * 8 + [False] * 7


def test_methods_take_different_courses():
    """The files tell methods apart (but for beta, which belongs to training)."""
    ends = [tuple(recorded(name)[-1].values()) for name in COURSES if name != "beta-vae"]
    assert len(set(ends)) == len(ends)


def record():
    """Write the files anew."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in COURSES:
        with (FOLDER / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            for row in course(name):
                rounded = {k: v if isinstance(v, str) else f"{v:.6g}" for k, v in row.items()}
                writer.writerow(rounded)


if __name__ == "__main__":
    record()
