"""The studies: that every table of the paper is asked for, with every method, as it says."""

from dataclasses import fields

import pytest

from smslib import benchmark, simulate, sweep
from smslib.priors import METHODS
from smslib.recipes import CHANGES, RECIPES, Recipe
from smslib.studies import METHODS as OF_THE_PAPER
from smslib.studies import STUDIES


def configs(name):
    return sweep.chain(*STUDIES[name]().values())


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_configuration_is_one_that_a_run_understands(name):
    for config in configs(name):
        known = set(METHODS) | set(benchmark.CONTROLS) | {"shuffled"}
        assert config["arm"] in benchmark.ARMS
        assert config["method"] in known
        assert set(config.get("changes", ())) <= set(CHANGES)
        for part in ("mechanism", "held_out"):
            simulate.Mechanism(**config.get(part, {}))
        simulate.Violation(**config.get("violation", {}))
        assert len(sweep.run_id(config)) == 12


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_no_setting_asks_twice_for_a_run(name):
    for runs in STUDIES[name]().values():
        ids = [sweep.run_id(config) for config in runs]
        assert len(ids) == len(set(ids))


def test_table1_has_every_method_in_every_arm():
    found = {(config["arm"], config["method"]) for config in configs("table1")}
    assert {(arm, method) for arm in benchmark.ARMS for method in OF_THE_PAPER} <= found
    assert {("smslib", control) for control in benchmark.CONTROLS} <= found


def test_our_recipe_has_ten_seeds_in_table1_and_the_released_one_five():
    seeds = {"smslib": 10, "released": 5, "corrected": 5}
    for arm, n in seeds.items():
        runs = [c for c in configs("table1") if (c["arm"], c["method"]) == (arm, "svae+")]
        assert sorted(config["seed"] for config in runs) == list(range(n))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("table4", {"p5", "p10", "p15", "p20"}),
        ("table5", {"s0.2", "s0.5", "s0.9"}),
        ("table6", {"e1", "e2", "e5"}),
        ("table7", {"s0.2-0.5", "s0.5-0.7", "s0.7-0.99"}),
        ("table8", {"e1-3", "e2-4", "e5-7"}),
        ("table10", {"n1", "n4", "n7", "n12", "n15"}),
    ],
)
def test_the_papers_settings_are_there(name, settings):
    assert settings <= set(STUDIES[name]())


def test_a_run_that_two_tables_share_is_one_run():
    table1 = {sweep.run_id(config) for config in configs("table1")}
    for name, setting in (
        ("table4", "p15"),
        ("table10", "n15"),
        ("cells", "k100-n500"),
        ("cells", "k100-n1000"),
    ):
        ids = {sweep.run_id(config) for config in STUDIES[name]()[setting]}
        assert bool(ids & table1) == (setting != "k100-n1000")


def test_table_settings_by_hand():
    (fitted,) = {str(c["mechanism"]) for c in STUDIES["table7"]()["s0.5-0.7"]}
    (new,) = {str(c["held_out"]) for c in STUDIES["table7"]()["s0.5-0.7"]}
    assert (fitted, new) == ("{'density': 0.5}", "{'density': 0.7}")
    assert {c["n_latent"] for c in configs("table8")} == {5}
    assert {c["sparsity"] for c in STUDIES["figure4"]()["alpha40"] if "sparsity" in c} == {40.0}


def test_violations_come_one_at_a_time_and_are_compared_with_none():
    study, table1 = STUDIES["violations"](), {sweep.run_id(c) for c in configs("table1")}
    assert {sweep.run_id(config) for config in study.pop("none")} <= table1
    broken = [config["violation"] for config in sweep.chain(*study.values())]
    assert all(len(violation) == 1 for violation in broken)
    every = {field.name for field in fields(simulate.Violation)}
    assert {name for violation in broken for name in violation} == every


def test_what_is_read_in_other_axes_are_the_fits_of_table_4():
    asked = {sweep.run_id(config) for config in configs("table4")}
    plain = [{k: v for k, v in config.items() if k != "axes"} for config in configs("axes")]
    assert all("axes" in config for config in configs("axes"))
    assert {sweep.run_id(config) for config in plain} <= asked


def test_the_waterfall_ends_at_our_recipe():
    recipe = RECIPES["paper"]
    for name in CHANGES:
        recipe = CHANGES[name](recipe)
    assert isinstance(recipe, Recipe)
    assert recipe == RECIPES["smslib"]
    steps = [c["changes"] for c in configs("waterfall") if "changes" in c]
    assert all(list(CHANGES)[: len(step)] == step for step in steps)
    # With no change it is the released arm, with three the corrected one, with all ours.
    assert {len(step) for step in steps} == set(range(1, len(CHANGES))) - {3}
