"""A fit that was interrupted and called again is the fit that was not."""

from dataclasses import replace

import pytest
import torch
from scipy import sparse
from torch import distributed

from smslib import checkpoints, train
from smslib.batches import Packed, Passes, Rows, Shuffled
from smslib.data import Cells, Design
from smslib.model import SMSVAE
from smslib.train import TrainConfig, fit

N_GENES = 6
DESIGN = Design.single_target(["a", "b", "c"])
STEPS = {"newton": True, "norm": "none"}
CONFIG = TrainConfig(epochs=6, batch_size=16, warmup_epochs=2, seed=3)


def make_cells(n_cells, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.full((n_cells, N_GENES), 4.0), generator=generator) + 1
    return Cells(counts, torch.arange(n_cells) % DESIGN.n_conditions)


CELLS, OTHERS = make_cells(64, 0), make_cells(32, 1)


def make_model(seed=0, **options):
    options = {"n_latent": 2, "n_hidden": 8, "dropout": 0.1, "norm": "batch", **options}
    return SMSVAE.preset("svae+", DESIGN, N_GENES, seed=seed, **options)


def go(config=CONFIG, *, path=None, cells=CELLS, validation=OTHERS, **options):
    model = make_model(**options)
    history = fit(model, cells, config, validation=validation, checkpoint=path, progress=False)
    return model, history


def interrupted(monkeypatch, after, *arguments, **options):
    """Break a fit off in the epoch after so many whole ones."""
    epoch, seen = train._epoch, []

    def fragile(*given):
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt
        return epoch(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_epoch", fragile)
        with pytest.raises(KeyboardInterrupt):
            go(*arguments, **options)


def assert_same(one, other):
    (model, history), (its_model, its_history) = one, other
    for name, part in model.state_dict().items():
        assert torch.equal(part, its_model.state_dict()[name]), name
    frames = (found.frame().drop(columns="seconds") for found in (history, its_history))
    assert next(frames).equals(next(frames))
    assert history.best_epoch == its_history.best_epoch


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "muon_weight_decay": 0.1},
        {"schedule": "constant", "keep": "last", "weight_decay": 0.1},
        {"n_draws": 2, "weighted_share": 0.5},
        {"learning_rate": 0.5},  # the best weights are not the last
    ],
)
def test_what_was_interrupted_ends_with_the_same_bits(tmp_path, monkeypatch, after, changes):
    config, path = replace(CONFIG, **changes), tmp_path / "fit.ckpt"
    interrupted(monkeypatch, after, config, path=path)
    calls = []
    epoch = train._epoch
    monkeypatch.setattr(train, "_epoch", lambda *given: calls.append(1) or epoch(*given))
    resumed = go(config, path=path)
    assert len(calls) == config.epochs - after
    assert_same(resumed, go(config))


def test_the_inference_with_steps_goes_on_in_its_own_epoch(tmp_path, monkeypatch):
    config, path = replace(CONFIG, encoder_share=0.5), tmp_path / "fit.ckpt"
    interrupted(monkeypatch, 4, config, path=path, **STEPS)
    resumed = go(config, path=path, **STEPS)
    assert resumed[0].newton
    assert_same(resumed, go(config, **STEPS))


def test_interrupted_again_and_again_it_still_arrives(tmp_path, monkeypatch):
    path = tmp_path / "fit.ckpt"
    for _ in range(3):
        interrupted(monkeypatch, 1, path=path)
    assert_same(go(path=path), go())


def test_batches_in_a_fixed_order_go_on(tmp_path, monkeypatch):
    cells = Passes([CELLS[:16], CELLS[16:32], CELLS[32:48]], n_cells=48)
    path = tmp_path / "fit.ckpt"
    interrupted(monkeypatch, 2, path=path, cells=cells)
    assert_same(go(path=path, cells=cells), go(cells=cells))


def test_shuffled_batches_go_on_with_the_pass_that_was_due(tmp_path, monkeypatch):
    def shuffled():
        matrix = sparse.csr_matrix(CELLS.counts.numpy())
        return Shuffled(Rows(Packed.of(matrix), CELLS.condition), CONFIG.batch_size, seed=3)

    path = tmp_path / "fit.ckpt"
    interrupted(monkeypatch, 2, path=path, cells=shuffled())
    assert_same(go(path=path, cells=shuffled()), go(cells=shuffled()))


def test_the_global_random_state_is_left_alone(tmp_path, monkeypatch):
    interrupted(monkeypatch, 2, path=tmp_path / "fit.ckpt")
    before = torch.get_rng_state()
    go(path=tmp_path / "fit.ckpt")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("patience", [None, 1])
def test_a_fit_that_has_ended_is_not_made_again(tmp_path, monkeypatch, patience):
    config, path = replace(CONFIG, learning_rate=0.5, patience=patience), tmp_path / "fit.ckpt"
    first = go(config, path=path)
    assert (len(first[1].rows) < config.epochs) == (patience is not None)
    monkeypatch.setattr(train, "_epoch", None)
    assert_same(go(config, path=path), first)


@pytest.mark.parametrize(
    "other",
    [
        {"config": replace(CONFIG, seed=4)},
        {"cells": make_cells(64, 2)},
        {"cells": CELLS[torch.arange(64).flip(0)]},
        {"cells": Cells(CELLS.counts.flip(1), CELLS.condition)},
        {"validation": None},
        {"validation": make_cells(32, 4)},
        {"seed": 1},
        {"n_hidden": 9},
        {"sparsity": 7.0},
        {"estimator": "sampled"},
    ],
)
def test_the_checkpoint_of_another_fit_is_refused_and_kept(tmp_path, other):
    path = tmp_path / "fit.ckpt"
    go(path=path)
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=r"fit\.ckpt is the checkpoint of another fit"):
        go(path=path, **other)
    assert path.read_bytes() == kept


def test_the_checkpoint_of_another_kind_of_device_is_refused_before_anything_is_loaded(tmp_path):
    path, layer = tmp_path / "fit.ckpt", torch.nn.Linear(2, 2)
    parts, here = {"layer": layer}, torch.device("cpu")
    kept = checkpoints.Checkpoint(path, "one", parts, torch.Generator(), here)
    kept.write(3)
    state = torch.load(path)
    state["random"]["draws on the device"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, path)
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="fit on another kind of device than cpu"):
        kept.resume()
    assert not layer.weight.any()


@pytest.mark.parametrize("length", [0, 10, 3000])
def test_a_damaged_checkpoint_is_told_of(tmp_path, length):
    path = tmp_path / "fit.ckpt"
    go(path=path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        ValueError, match=r"fit\.ckpt is no whole checkpoint .* begin the fit anew"
    ):
        go(path=path)


def test_a_pickled_object_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "fit.ckpt"
    torch.save({"fit": print}, path)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        go(path=path)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "fit.ckpt"
    interrupted(monkeypatch, 2, path=path)
    kept = path.read_bytes()

    def full(_state, _path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written"):
        go(path=path)
    assert path.read_bytes() == kept
    assert [found.name for found in tmp_path.iterdir()] == ["fit.ckpt"]


def test_a_folder_that_is_not_there_is_told_of_before_the_fit(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere, where the checkpoint is to lie, is no folder"):
        go(path=tmp_path / "nowhere" / "fit.ckpt")


def test_processes_that_share_a_fit_keep_no_checkpoint(tmp_path):
    group = distributed.ProcessGroup(distributed.HashStore(), 0, 1)
    with pytest.raises(ValueError, match="a fit shared by processes keeps no checkpoint"):
        fit(make_model(), CELLS, CONFIG, checkpoint=tmp_path / "fit.ckpt", group=group)


def test_without_a_path_nothing_is_read_or_summed(monkeypatch):
    monkeypatch.setattr(train, "identity", None)
    monkeypatch.setattr(checkpoints.tensors, "write", None)
    go()
