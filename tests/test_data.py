"""Cells, designs and the door: what goes in comes out, and bad input is told what is wrong."""

import contextlib
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from smslib.data import (
    Cells,
    Design,
    chosen_device,
    from_anndata,
    minibatches,
    on_design,
    seeded,
    single,
    split_cells,
    streams,
)

COUNTS = np.array([[0, 2, 1], [3, 0, 0], [0, 0, 5], [1, 1, 1]])
LABELS = ("ctrl", "KLF1", "KLF1+MYC", "ctrl")


def screen(counts=COUNTS, labels=LABELS, **slots) -> anndata.AnnData:
    counts = np.asarray(counts, dtype=float) if isinstance(counts, list) else counts
    return anndata.AnnData(
        X=counts,
        obs=pd.DataFrame({"target": list(labels)}, index=[f"cell{i}" for i in range(len(labels))]),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(counts.shape[1])]),
        **slots,
    )


def load(adata, key="target", control="ctrl", **options):
    return from_anndata(adata, perturbation_key=key, control=control, **options)


def altered(cell: int, gene: int, value: float) -> np.ndarray:
    counts = COUNTS.astype(float)
    counts[cell, gene] = value
    return counts


# ------------------------------------------------------------------------------ from_anndata


def test_reads_counts_labels_and_a_combination():
    cells, design = load(screen())
    assert cells.counts.dtype == torch.float32
    assert cells.counts.tolist() == COUNTS.tolist()
    assert design.conditions == ("ctrl", "KLF1", "KLF1+MYC")
    assert design.targets == ("KLF1", "MYC")
    assert design.matrix.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert cells.condition.tolist() == [0, 1, 2, 0]


def test_a_part_named_like_the_control_adds_no_target():
    _, design = load(screen(labels=("ctrl", "KLF1+ctrl", "MYC", "ctrl")))
    assert design.targets == ("KLF1", "MYC")
    assert design.matrix.tolist() == [[0, 0], [1, 0], [0, 1]]


def test_another_separator_leaves_plus_alone():
    _, design = load(screen(labels=("ctrl", "A+B", "A+B|C", "ctrl")), sep="|")
    assert design.targets == ("A+B", "C")


count_matrices = hnp.arrays(
    np.int64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=7),
    elements=st.integers(0, 40),
).map(
    lambda counts: counts + np.eye(*counts.shape, dtype=np.int64) + (counts.sum(1) == 0)[:, None]
)


@given(count_matrices)
@settings(max_examples=30)
def test_every_storage_gives_the_same_cells(counts):
    labels = ["ctrl", *("abc"[i % 3] for i in range(len(counts) - 1))]
    dense = screen(counts, labels)
    csr = screen(sparse.csr_matrix(counts), labels)
    csc = screen(sparse.csc_matrix(counts.astype(np.float32)), labels)
    layered = screen(np.log1p(counts), labels, layers={"raw": sparse.csc_matrix(counts)})
    with tempfile.TemporaryDirectory() as folder:
        csr.write_h5ad(Path(folder) / "screen.h5ad")
        backed = anndata.read_h5ad(Path(folder) / "screen.h5ad", backed="r")
        loaded = [load(adata) for adata in (dense, csr, csc, backed)]
        backed.file.close()
    loaded.append(load(layered, layer="raw"))
    for cells, design in loaded:
        np.testing.assert_array_equal(cells.counts.numpy(), counts)
        assert [design.conditions[row] for row in cells.condition] == labels


def test_labels_that_are_numbers_are_compared_as_text():
    adata = screen()
    adata.obs["target"] = np.arange(adata.n_obs) % 3
    cells, design = load(adata, control=0)
    assert design.conditions == ("0", "1", "2")
    assert cells.condition.tolist() == adata.obs["target"].tolist()
    with pytest.raises(ValueError, match=r"control '7' is not among .* known: \['0', '1', '2'\]"):
        load(adata, control=7)
    adata.obs["target"] = adata.obs["target"].astype(float)
    with pytest.raises(ValueError, match=r"control '0' is not among .*; there is '0\.0'"):
        load(adata, control=0)


def test_counts_that_were_put_aside_are_pointed_at():
    adata = screen(COUNTS / 2)
    adata.raw = screen()
    with pytest.raises(ValueError, match=r"adata\.raw is there as well: adata\.raw\.to_adata\(\)"):
        load(adata)


@pytest.mark.parametrize(("there", "best"), [(True, "cuda"), (False, "cpu")])
def test_the_device_that_is_there_is_chosen_and_no_other_is_taken_for_it(monkeypatch, there, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert chosen_device("auto") == torch.device(best)
    assert chosen_device("cpu") == torch.device("cpu")
    if there:
        assert chosen_device("cuda:1") == torch.device("cuda:1")
    else:
        with pytest.raises(ValueError, match="device is 'cuda', but torch .* finds no GPU"):
            chosen_device("cuda")


def test_cells_without_controls_are_read_onto_a_design_that_exists():
    _, design = load(screen())
    some = on_design(screen()[[2, 1]], design, perturbation_key="target")
    assert some.counts.tolist() == COUNTS[[2, 1]].tolist()
    assert some.condition.tolist() == [2, 1]


def test_a_condition_that_the_design_lacks_is_named_with_the_nearest_that_it_has():
    _, design = load(screen())
    other = screen(labels=("ctrl", "KFL1", "KLF1", "ctrl"))
    with pytest.raises(KeyError, match=r"'KFL1'.*'KLF1'"):
        on_design(other, design, perturbation_key="target")


def test_the_input_is_left_alone_and_not_shared():
    counts = COUNTS.astype(np.float32)
    adata = screen(counts)
    cells, _ = load(adata)
    cells.counts.add_(1)
    np.testing.assert_array_equal(adata.X, COUNTS)


def repeated(values: np.ndarray) -> sparse.csr_matrix:
    """Counts of three cells, the first one's all in its first gene."""
    counts, n = np.append(values, [1, 1]).astype(values.dtype), len(values)
    return sparse.csr_matrix((counts, np.zeros(n + 2, int), [0, n, n + 1, n + 2]), (3, 2))


@pytest.mark.parametrize("kind", ["csr", "csc"])
@pytest.mark.parametrize(
    ("values", "total"),
    [(np.array([200, 100], np.uint8), 300), (np.array([2**23, 2**23 - 1], np.float32), 2**24 - 1)],
)
def test_repeated_entries_are_added_up_in_a_type_that_holds_the_sum(kind, values, total):
    counts = repeated(values).asformat(kind)
    adata = screen(counts, LABELS[:3])
    cells, _ = load(adata)
    assert cells.counts.tolist() == [[total, 0], [1, 0], [1, 0]]
    assert counts.data.tolist() == [*values, 1, 1]  # the input is left alone


def test_repeated_entries_are_bounded_by_their_sum():
    adata = screen(repeated(np.array([2**24, 1], np.uint32)), LABELS[:3])
    with pytest.raises(ValueError, match="holds 16777217; expected counts up to 16,777,216"):
        load(adata)


@pytest.mark.parametrize(
    ("adata", "options", "error", "message"),
    [
        (screen(), {"key": "targets"}, KeyError, r"'targets' is not in adata\.obs.*'target'"),
        (screen(), {"layer": "raw"}, KeyError, r"layer 'raw' is not in adata\.layers"),
        (screen(), {"control": "ctlr"}, ValueError, r"control 'ctlr' is not among.*\['ctrl'\]"),
        (screen(), {"control": "zzz"}, ValueError, r"control 'zzz'.*known: \['KLF1'"),
        (
            screen(labels=("ctrl", "A + B", "A", "nan")),
            {},
            ValueError,
            r"targets \[' B', 'A ', 'nan'\] have blanks around their names or are missing labels",
        ),
        (
            screen(labels=("ctrl", None, "KLF1", None)),
            {},
            ValueError,
            r"2 missing labels, first in cell 'cell1'; drop",
        ),
        (
            screen(altered(2, 1, -1.0)),
            {},
            ValueError,
            r"adata\.X holds -1\.0 for cell 'cell2', gene 'gene1'.*non-negative integers.*layer=",
        ),
        (
            screen(sparse.csr_matrix(altered(1, 2, 0.5))),
            {},
            ValueError,
            r"adata\.X holds 0\.5 for cell 'cell1', gene 'gene2'",
        ),
        (
            screen(sparse.csc_matrix(altered(3, 0, np.nan)), layers={"raw": COUNTS}),
            {},
            ValueError,
            r"holds nan for cell 'cell3', gene 'gene0'.*available: \['raw'\]",
        ),
        (
            screen(layers={"scaled": COUNTS / 2}),
            {"layer": "scaled"},
            ValueError,
            r"adata\.layers\['scaled'\] holds 0\.5 for cell 'cell0', gene 'gene2'",
        ),
        (
            screen([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]),
            {},
            ValueError,
            r"2 cells have no UMIs, first 'cell1'; remove them",
        ),
        (
            anndata.AnnData(obs=pd.DataFrame({"target": ["ctrl"]}, index=["cell0"])),
            {},
            ValueError,
            r"adata\.X is empty; pass layer=",
        ),
    ],
)
def test_bad_input_says_what_where_and_the_fix(adata, options, error, message):
    with pytest.raises(error, match=message):
        load(adata, **options)


def test_a_category_without_cells_is_refused():
    adata = screen()
    adata.obs["target"] = pd.Categorical(LABELS, categories=["ctrl", "KLF1", "KLF1+MYC", "GATA1"])
    with pytest.raises(ValueError, match=r"without cells: \['GATA1'\].*remove_unused_categories"):
        load(adata)


@pytest.mark.parametrize("axis", ["obs", "var"])
def test_repeated_names_are_refused(axis):
    adata = screen()
    setattr(adata, f"{axis}_names", ["same", "same", "other", "more"][: 4 - (axis == "var")])
    message = rf"adata\.{axis}_names are not unique: \['same'\] repeat; .*{axis}_names_make_unique"
    with pytest.raises(ValueError, match=message):
        load(adata)


# ------------------------------------------------------------------------------------ Design


names = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=8, unique=True)


@given(names, st.data())
def test_extending_a_design_leaves_old_rows_untouched(targets, data):
    n_old = data.draw(st.integers(1, len(targets) - 1))
    old = Design.single_target(targets[:n_old])
    new = old.extend(targets[n_old:])
    assert new.conditions == ("control", *targets)
    assert new.targets == tuple(targets)
    assert torch.equal(new.matrix[: n_old + 1, :n_old], old.matrix)
    assert not new.matrix[: n_old + 1, n_old:].any()
    assert torch.equal(new.matrix[n_old + 1 :, n_old:], torch.eye(len(targets) - n_old))
    assert not new.matrix[n_old + 1 :, :n_old].any()
    assert torch.equal(old.matrix, Design.single_target(targets[:n_old]).matrix)


def test_extending_keeps_doses_and_their_type():
    old = Design(("c", "half"), ("half",), torch.tensor([[0.0], [0.5]], dtype=torch.float64))
    new = old.extend(["a"])
    assert new.matrix.dtype == torch.float64
    assert new.matrix.tolist() == [[0, 0], [0.5, 0], [0, 1]]
    assert (new.n_conditions, new.n_targets) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("c", "a"), ("a", "b"), torch.zeros(2, 1)), r"shape \(2, 1\).* 2 conditions and 2 tar"),
        ((("c", "a", "a"), ("a",), torch.zeros(3, 1)), r"conditions are not unique: \['a'\]"),
        ((("c", "a"), ("a", "a"), torch.zeros(2, 2)), r"targets are not unique: \['a'\]"),
        ((("a", "c"), ("a",), torch.tensor([[1.0], [0.0]])), r"control 'a'.*put the unperturbed"),
    ],
)
def test_an_inconsistent_design_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Design(*arguments)


def test_index_finds_rows_and_names_the_nearest():
    design = Design.single_target(["IFNGR1", "JAK2"])
    assert design.index(["JAK2", "control"]).tolist() == [2, 0]
    with pytest.raises(KeyError, match=r"unknown condition 'IFNGR'; nearest known: \['IFNGR1'\]"):
        design.index(["IFNGR"])
    with pytest.raises(KeyError, match="unknown condition 'IFNGR'; .* unknown condition 'JAK'; n"):
        design.index(["IFNGR", "JAK2", "JAK"])
    assert torch.equal(design.to("cpu").matrix, design.matrix)


# ------------------------------------------------------------------------------------- Cells


def numbered(condition) -> Cells:
    """Cells whose single count is their own position, so that any subset tells who is in it."""
    condition = torch.as_tensor(condition, dtype=torch.long)
    return Cells(torch.arange(len(condition), dtype=torch.float32)[:, None] + 1, condition)


def who(cells: Cells) -> list[int]:
    return (cells.counts[:, 0] - 1).int().tolist()


def test_cells_index_select_and_sum():
    cells = numbered([0, 1, 2, 1])
    assert len(cells) == 4
    assert cells.n_genes == 1
    assert who(cells[torch.tensor([3, 0])]) == [3, 0]
    assert cells[torch.tensor([3, 0])].condition.tolist() == [1, 0]
    assert who(cells[1:3]) == [1, 2]
    assert who(cells[np.array([True, False, False, True])]) == [0, 3]
    assert who(cells.of(torch.tensor([1, 2]))) == [1, 2, 3]
    assert Cells(torch.tensor([[1.0, 2.0]]), torch.tensor([0])).library.tolist() == [[3.0]]
    assert cells.to("cpu").device == torch.device("cpu")


conditions = st.lists(st.integers(0, 4), min_size=1, max_size=60)
fractions = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda weights: [weight / sum(weights) for weight in weights]
)


@given(conditions, fractions, st.integers(0, 2**32 - 1))
def test_a_split_is_disjoint_exhaustive_and_stratified(condition, shares, seed):
    cells = numbered(condition)
    parts = split_cells(cells, shares, seed=seed)
    assert sorted(sum((who(part) for part in parts), [])) == list(range(len(cells)))
    for part, share in zip(parts, shares, strict=True):
        assert who(part) == sorted(who(part))
        for value in set(condition):
            n_here = int((part.condition == value).sum())
            assert abs(n_here - share * condition.count(value)) <= 1 + 1e-9


def test_a_split_depends_on_its_seed_only():
    cells = numbered([0] * 50)
    first = who(split_cells(cells, [0.5, 0.5], seed=1)[0])
    torch.manual_seed(0)
    assert who(split_cells(cells, [0.5, 0.5], seed=1)[0]) == first
    assert who(split_cells(cells, [0.5, 0.5], seed=2)[0]) != first


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], [0.0, 1.0]])
def test_shares_that_do_not_divide_the_cells_are_refused(shares):
    with pytest.raises(ValueError, match="expected positive shares that sum to 1"):
        split_cells(numbered([0, 0]), shares, seed=0)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_minibatches_cover_the_cells_but_for_a_small_tail(n_cells, batch_size, smallest):
    cells = numbered([0] * n_cells)
    batches = list(minibatches(cells, batch_size, smallest=smallest))
    sizes = [min(batch_size, n_cells - start) for start in range(0, n_cells, batch_size)]
    assert [len(batch) for batch in batches] == [size for size in sizes if size >= smallest]
    together = sum((who(batch) for batch in batches), [])
    assert together == list(range(n_cells))[: len(together)] or smallest > batch_size


def test_minibatches_shuffle_by_their_generator_alone():
    cells = numbered([0] * 20)

    def order(seed: int) -> list[int]:
        batches = minibatches(cells, 6, generator=torch.Generator().manual_seed(seed))
        return sum((who(batch) for batch in batches), [])

    assert sorted(order(0)) == list(range(20))
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != list(range(20))


def test_seeded_gives_the_same_draws_and_restores_the_global_state():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)
    with seeded(4):
        assert not torch.equal(torch.rand(4), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_the_processor_asks_no_gpu(monkeypatch):
    for name in ("device_count", "get_rng_state", "manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, None)
    with seeded(3):
        drawn = torch.rand(4)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(drawn, torch.rand(4, generator=generator))


def test_one_gpu_of_several_is_seeded_and_put_back(monkeypatch):
    """As far as the calls go, which need no GPU."""
    done, second = [], torch.device("cuda:1")

    def note(name):
        return lambda *given: done.append((name, *given))

    for name in ("set_rng_state", "manual_seed"):
        monkeypatch.setattr(torch.cuda, name, note(name))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: contextlib.nullcontext(done.append(device))
    )
    with seeded(3, "cuda:1"):
        done.append("block")
    state = ("set_rng_state", "state of cuda:1", second)
    assert done == [second, ("manual_seed", 3), "block", state]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_seeding_a_gpu_gives_its_draws_and_restores_its_state():
    before = torch.cuda.get_rng_state()
    with seeded(3, "cuda"):
        drawn = torch.rand(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    generator = torch.Generator("cuda").manual_seed(3)
    assert torch.equal(drawn, torch.rand(4, device="cuda", generator=generator))


def test_streams_do_not_depend_on_each_other_or_on_later_ones():
    drawn = streams(3, ("a", "b"))
    assert list(drawn) == ["a", "b"]
    first, second = (rng.random(4).tolist() for rng in drawn.values())
    assert first != second
    more = streams(3, ("a", "b", "c"))
    assert more["b"].random(4).tolist() == second  # although nothing was drawn from "a"
    child = np.random.SeedSequence(3).spawn(1)[0]
    assert np.random.default_rng(child).random(4).tolist() == first
    assert streams(4, ("a",))["a"].random(4).tolist() != first


def test_single_keeps_the_values_of_counts():
    counts = np.arange(6).reshape(2, 3)
    assert single(counts).dtype == torch.float32
    assert single(counts).tolist() == counts.tolist()
