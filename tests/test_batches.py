"""Loaders against tensors: the same cells in the same order give the same fit and scores."""

import importlib.util
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from smslib.batches import Packed, Passes, Rows, Shuffled, from_anndata
from smslib.data import Batches, Cells, minibatches, read_design
from smslib.evaluate import by_condition, elbo, iwelbo, latents
from smslib.model import SMSVAE
from smslib.simulate import sparse_shift
from smslib.train import TrainConfig, fit

SCREEN = sparse_shift(n_cells_per_condition=8, n_targets=6, n_latent=3, n_genes=40, seed=0)
CELLS = SCREEN.cells
CONFIG = TrainConfig(epochs=3, batch_size=16, warmup_epochs=0, seed=5)
needs_scdataset = pytest.mark.skipif(
    not importlib.util.find_spec("scdataset"), reason="scdataset is not installed"
)


def packed(cells=CELLS):
    return Packed.of(sparse.csr_matrix(cells.counts.numpy()))


def rows(cells=CELLS):
    return Rows(packed(cells), cells.condition)


def in_order(cells=CELLS, batch_size=16):
    return Shuffled(rows(cells), batch_size)


def make_model(**options):
    return SMSVAE.preset(
        "svae+", SCREEN.design, 40, **{"n_latent": 3, "n_hidden": 8, "seed": 1, **options}
    )


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


FIRST = SCREEN.design.conditions[int(CELLS.condition[0])]


class Order:
    """A loader of tensors, whose first passes are recorded."""

    def __init__(self, batches):
        self.batches, self.n_cells, self.passes = batches, batches.n_cells, []

    def __iter__(self):
        self.passes.append([])
        for batch in self.batches:
            self.passes[-1].append(batch)
            yield batch


# ----------------------------------------------------------------------------------- packed


@given(
    hnp.arrays(np.int64, (5, 4), elements=st.integers(0, 70_000)),
    st.lists(st.integers(0, 4), max_size=8),
)
@settings(max_examples=40)
def test_packed_rows_are_those_of_the_matrix(counts, chosen):
    matrix = Packed.of(sparse.csr_matrix(counts))
    chosen = np.array(chosen, dtype=int)
    np.testing.assert_array_equal(matrix[chosen], counts[chosen])
    np.testing.assert_array_equal(matrix[1:4], counts[1:4])


@pytest.mark.parametrize(
    ("largest", "kind"), [(255, np.uint8), (256, np.uint16), (65_536, np.uint32)]
)
def test_packed_counts_take_the_narrowest_type(largest, kind):
    matrix = Packed.of(sparse.csr_matrix(np.array([[0, largest], [1, 0]], dtype=float)))
    assert matrix.values.dtype == kind
    assert matrix.columns.dtype == np.int32
    assert matrix.offsets.dtype == np.int64
    assert matrix[:].tolist() == [[0, largest], [1, 0]]


def test_offsets_beyond_32_bits():
    """Entries far into an array, which here is a view that repeats one page."""
    start = 2**33
    values = np.lib.stride_tricks.as_strided(np.array([7], dtype=np.uint8), (start + 2,), (0,))
    columns = np.lib.stride_tricks.as_strided(np.array([1], dtype=np.int32), (start + 2,), (0,))
    matrix = Packed(values, columns, np.array([0, start, start + 1]), 3)
    assert matrix[np.array([1])].tolist() == [[0, 7, 0]]


# ------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "kind", [Packed.of, sparse.csr_matrix, sparse.csr_array, lambda counts: counts.toarray()]
)
@pytest.mark.parametrize(
    "index", [torch.tensor([3, 0, 3]), np.array([3, 0, 3]), slice(2, 6)], ids=["t", "a", "s"]
)
def test_rows_are_cells(kind, index):
    source = Rows(kind(sparse.csr_matrix(CELLS.counts.numpy())), CELLS.condition)
    found, expected = source[index], CELLS[index]
    assert found.counts.dtype == torch.float32
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.condition, expected.condition)
    assert (len(source), source.n_genes) == (len(CELLS), CELLS.n_genes)


@pytest.mark.parametrize("kind", [Packed.of, sparse.csr_matrix, lambda counts: counts.toarray()])
@pytest.mark.parametrize("none", [torch.zeros(0, dtype=torch.long), slice(3, 3), np.zeros(48) > 0])
def test_no_rows_are_no_cells(kind, none):
    found = Rows(kind(sparse.csr_matrix(CELLS.counts.numpy())), CELLS.condition)[none]
    assert (found.counts.shape, len(found.condition)) == ((0, 40), 0)


def twice(kind, *values):
    """One cell whose counts of one gene are entries of a sparse matrix of its own."""
    column = np.zeros(len(values), dtype=int)
    counts = sparse.csr_matrix((np.array(values, kind), column, [0, len(values)]), shape=(1, 1))
    return Rows(counts, torch.tensor([0]))


def test_repeated_entries_are_added_up_before_they_are_checked():
    assert twice(np.uint8, 200, 100)[:].counts.tolist() == [[300]]
    assert twice(np.float32, 2**23, 2**23)[:].counts.tolist() == [[2**24]]
    with pytest.raises(ValueError, match="row 0 has no UMIs, or values other than raw counts"):
        twice(np.float32, 2**24, 1)[:]


def test_values_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="of type complex128; expected real numbers"):
        Rows(np.ones((2, 3), dtype=complex), torch.tensor([0, 1]))


def test_conditions_of_other_cells_are_refused():
    with pytest.raises(ValueError, match=r"counts of 48 cells and 3 conditions; expected one"):
        Rows(packed(), CELLS.condition[:3])


def test_rows_go_to_the_device_of_the_model():
    there = Rows(packed(), CELLS.condition, device="meta")
    assert there[:2].counts.device.type == "meta"


def make_adata(counts):
    names = np.array(SCREEN.design.conditions)[CELLS.condition.numpy()]
    obs = pd.DataFrame({"target": names}, index=[f"cell{n}" for n in range(len(names))])
    var = pd.DataFrame(index=[f"gene{n}" for n in range(counts.shape[1])])
    return anndata.AnnData(counts, obs=obs, var=var)


@pytest.mark.parametrize("sparse_counts", [True, False])
def test_a_screen_is_read_by_the_same_door(sparse_counts):
    counts = CELLS.counts.numpy()
    adata = make_adata(sparse.csr_matrix(counts) if sparse_counts else counts)
    first = adata.obs["target"].iloc[0]
    found, design = from_anndata(adata, perturbation_key="target", control=first)
    assert isinstance(found.counts, Packed) == sparse_counts
    assert (design.conditions[0], set(design.conditions)) == (first, set(adata.obs["target"]))
    assert torch.equal(found[:].counts, CELLS.counts)
    names = [design.conditions[row] for row in found.condition]
    assert names == adata.obs["target"].tolist()


def stored(tmp_path, counts):
    """The screen in a file that stays there."""
    make_adata(counts).write_h5ad(tmp_path / "screen.h5ad")
    return anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")


KINDS = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_its_rows_in_any_order(tmp_path, kind, monkeypatch):
    backed = stored(tmp_path, KINDS[kind](CELLS.counts.numpy()))
    if kind != "csc":
        monkeypatch.setattr(anndata.AnnData, "to_memory", None)  # which would read it whole
    found, design = from_anndata(backed, perturbation_key="target", control=FIRST)
    assert isinstance(found.counts, Packed) == (kind == "csc")
    assert set(design.conditions) == set(backed.obs["target"])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for index in (order, order[:9].repeat(2), slice(3, 30), order > 20):
        there = found[index]
        assert torch.equal(there.counts, CELLS.counts[index])
        assert torch.equal(there.condition, found.condition[index])


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_counts_of_a_file_are_checked_when_they_are_read(tmp_path, kind):
    counts = CELLS.counts.numpy().copy()
    counts[7, 2], counts[9], counts[11, 0], counts[13, 0] = 0.37, 0, np.nan, 2.0**25
    found, _ = from_anndata(
        stored(tmp_path, KINDS[kind](counts)), perturbation_key="target", control=FIRST
    )
    good = np.array([3, 8, 2])
    assert torch.equal(found[good].counts, CELLS.counts[good])
    message = r"row {} has no UMIs, or values other than raw counts .* up to 16,777,216"
    for row in (7, 9, 11, 13):
        with pytest.raises(ValueError, match=message.format(row)):
            found[np.array([20, row, 2])]
    with pytest.raises(ValueError, match=r"row 7 .*Noticed: 1 of 200 stored values are no counts"):
        found[4:9]


@pytest.mark.parametrize("kind", ["dense", "csr"])
@pytest.mark.parametrize("value", [2.0**24 + 1, 2.9999999999, 1e-60])
def test_counts_of_a_file_are_checked_before_they_are_rounded(tmp_path, kind, value):
    counts = CELLS.counts.numpy().astype(np.float64)
    counts[7, 2] = value
    backed = stored(tmp_path, KINDS[kind](counts))
    found, _ = from_anndata(backed, perturbation_key="target", control=FIRST)
    assert found[:5].counts.dtype == torch.float32
    with pytest.raises(ValueError, match="row 7 has no UMIs, or values other than raw counts"):
        found[5:9]


def test_a_fit_out_of_a_file_is_the_fit_in_memory(tmp_path):
    """And so are a layer and a part of it, which are read whole."""
    backed = stored(tmp_path, CELLS.counts.numpy())
    names = {"perturbation_key": "target", "control": FIRST}
    out_of_file, design = from_anndata(backed, **names)
    part, _ = from_anndata(backed[:20], **names)
    in_memory, _ = from_anndata(make_adata(CELLS.counts.numpy()), **names)
    ends = []
    for source in (out_of_file, in_memory):
        model = SMSVAE.preset("svae+", design, source.n_genes, n_latent=3, n_hidden=8)
        fit(model, Shuffled(source, 16, seed=5), CONFIG, progress=False)
        ends.append(weights(model))
    assert torch.equal(*ends)
    assert isinstance(part.counts, np.ndarray)
    assert torch.equal(part[:].counts, CELLS.counts[:20])
    with pytest.raises(KeyError, match="layer 'raw' is not in adata.layers"):
        from_anndata(backed, layer="raw", **names)


def test_conditions_are_known_without_the_counts(tmp_path, monkeypatch):
    backed = stored(tmp_path, CELLS.counts.numpy())
    in_memory = make_adata(CELLS.counts.numpy())
    expected = from_anndata(in_memory, perturbation_key="target", control=FIRST)
    monkeypatch.setattr(anndata.AnnData, "X", None)
    condition, design = read_design(backed, perturbation_key="target", control=FIRST)
    assert torch.equal(condition, expected[0].condition)
    assert design.conditions == expected[1].conditions
    assert torch.equal(design.matrix, expected[1].matrix)


def test_the_door_refuses_what_it_refuses_of_tensors():
    adata = make_adata(sparse.csr_matrix(CELLS.counts.numpy() + 0.5))
    with pytest.raises(ValueError, match="expected raw counts"):
        from_anndata(adata, perturbation_key="target", control=adata.obs["target"].iloc[0])


# ---------------------------------------------------------------------------------- batches


def test_both_loaders_are_batches_and_cells_are_not():
    assert isinstance(in_order(), Batches)
    assert isinstance(Passes([CELLS], 48), Batches)
    assert not isinstance(CELLS, Batches)


def test_without_a_seed_a_pass_is_in_order_and_with_one_it_is_that_of_fit():
    found = torch.cat([batch.counts for batch in in_order()])
    assert torch.equal(found, CELLS.counts)
    generator = torch.Generator().manual_seed(5)
    shuffled = Shuffled(rows(), 16, seed=5)
    for _ in range(2):  # passes, in two orders
        expected = list(minibatches(CELLS, 16, generator=generator))
        for batch, other in zip(shuffled, expected, strict=True):
            assert torch.equal(batch.counts, other.counts)


def test_batches_too_small_are_left_out_and_every_other_passed_on():
    parts = [CELLS[:42], CELLS[42:46], CELLS[46:]]
    found = list(minibatches(Passes(parts, 48), 16, smallest=3))
    assert [len(batch) for batch in found] == [42, 4]


@pytest.mark.parametrize(
    ("loader", "seen"), [(iter([CELLS[:16]]), 16), ([], 0)], ids=["used up", "empty"]
)
def test_a_pass_that_loses_cells_is_refused(loader, seen):
    with pytest.raises(ValueError, match=rf"gave {seen} cells, their n_cells is 48.*generator"):
        list(minibatches(Passes(loader, 48), 16))


def test_a_generator_is_refused_in_its_second_epoch():
    once = Passes(iter(list(in_order())), 48)
    with pytest.raises(ValueError, match="gave 0 cells, their n_cells is 48"):
        fit(make_model(), once, CONFIG, progress=False)


def test_what_a_loader_gives_is_converted():
    pairs = [(CELLS.counts[:30].numpy(), 1), (CELLS.counts[30:].numpy(), 2)]

    def convert(pair):
        counts, row = pair
        return Cells(torch.from_numpy(counts), torch.full((len(counts),), row))

    batches = Passes(pairs, 48, convert=convert)
    assert torch.cat([batch.condition for batch in batches]).tolist() == [1] * 30 + [2] * 18
    assert torch.equal(torch.cat([batch.counts for batch in batches]), CELLS.counts)


# -------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("options", [{}, {"newton": True}, {"norm": "batch"}], ids=str)
def test_a_fit_on_batches_is_the_fit_on_cells(options):
    config = replace(CONFIG, keep="best", n_draws=2, weighted_share=0.3, patience=5)
    held_out = CELLS[::3]
    plain, loaded = make_model(**options), make_model(**options)
    one = fit(plain, CELLS, config, validation=held_out, progress=False)
    batches = Shuffled(rows(), config.batch_size, seed=config.seed)
    validation = in_order(held_out, 1024)
    two = fit(loaded, batches, config, validation=validation, progress=False)
    assert torch.equal(weights(plain), weights(loaded))
    assert one.frame().drop(columns="seconds").equals(two.frame().drop(columns="seconds"))


def test_batches_larger_than_those_of_the_schedule_are_refused():
    with pytest.raises(
        ValueError, match="batches of 32 cells, but config.batch_size is 16; make them equal"
    ):
        fit(make_model(), in_order(batch_size=32), CONFIG, progress=False)


def test_batches_that_do_not_fit_the_model_are_refused():
    wrong = Cells(CELLS.counts, CELLS.condition + 1)
    with pytest.raises(ValueError, match=r"cells have conditions up to row 7"):
        fit(make_model(), in_order(wrong), CONFIG, progress=False)
    narrow = Cells(CELLS.counts[:, 1:], CELLS.condition)
    with pytest.raises(ValueError, match="validation have 39 genes, the model 40"):
        fit(make_model(), CELLS, CONFIG, validation=in_order(narrow), progress=False)


def test_the_rate_of_many_small_batches_never_rises():
    recorded = Order(in_order(batch_size=4))
    model = make_model()
    fit(model, recorded, replace(CONFIG, epochs=2), progress=False)
    assert [len(passed) for passed in recorded.passes] == [12, 12]
    assert bool(torch.isfinite(weights(model)).all())


def test_standardising_by_batches_is_standardising_by_cells():
    plain, loaded = make_model(), make_model()
    plain.standardise(CELLS)
    loaded.standardise(in_order())
    torch.testing.assert_close(loaded.centre, plain.centre)
    torch.testing.assert_close(loaded.spread, plain.spread)
    with pytest.raises(ValueError, match="16 cells of 39 genes to standardise by"):
        loaded.standardise(in_order(Cells(CELLS.counts[:, 1:], CELLS.condition)))


# --------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("score", [elbo, iwelbo, latents])
def test_scores_of_batches_are_the_scores_of_cells(score):
    model = make_model()
    options = {"n_draws": 5} if score is iwelbo else {}
    expected = score(model, CELLS, batch_size=16, **options)
    np.testing.assert_array_equal(score(model, in_order(), **options), expected)


def test_more_batches_than_are_read_ahead():
    model = make_model()
    expected = iwelbo(model, CELLS, n_draws=3, batch_size=1)
    np.testing.assert_array_equal(iwelbo(model, in_order(batch_size=1), n_draws=3), expected)


def test_a_table_by_condition():
    values = np.arange(48.0)
    expected = by_condition(values, CELLS, SCREEN.design)
    pd.testing.assert_frame_equal(by_condition(values, in_order(), SCREEN.design), expected)


# ------------------------------------------------------------------------------- scDataset


@needs_scdataset
def test_scdataset_gives_every_cell_and_the_fit_on_its_order(tmp_path):
    """Out of a file, in blocks of four cells; then on the same cells in memory."""
    from scdataset import BlockShuffling, scDataset

    make_adata(sparse.csr_matrix(CELLS.counts.numpy())).write_h5ad(tmp_path / "screen.h5ad")
    backed = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    dataset = scDataset(
        Rows(backed.X, CELLS.condition),
        BlockShuffling(block_size=4),
        batch_size=16,
        fetch_factor=2,
        seed=3,
    )
    recorded = Order(Passes(dataset, 48))
    loaded, plain = make_model(), make_model()
    fit(loaded, recorded, CONFIG, progress=False)
    every = torch.cat([batch.counts for batch in recorded.passes[0]])
    assert sorted(every.tolist()) == sorted(CELLS.counts.tolist())
    assert not torch.equal(every, CELLS.counts)

    class Again:
        n_cells = 48
        passes = iter(recorded.passes)

        def __iter__(self):
            return iter(next(self.passes))

    fit(plain, Again(), CONFIG, progress=False)
    assert torch.equal(weights(plain), weights(loaded))


@needs_scdataset
@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_a_file_is_fitted_in_five_lines(tmp_path, kind):
    from scdataset import BlockShuffling, scDataset

    adata = stored(tmp_path, KINDS[kind](CELLS.counts.numpy()))
    rows, design = from_anndata(adata, perturbation_key="target", control=FIRST)
    dataset = scDataset(rows, BlockShuffling(block_size=4), batch_size=16, fetch_factor=2)
    model = SMSVAE.preset("svae+", design, rows.n_genes)
    history = fit(model, Passes(dataset, len(rows)), replace(CONFIG, batch_size=16))
    assert len(history.rows) == CONFIG.epochs
