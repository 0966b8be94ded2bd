"""The claims ledger: its language, its verdicts, its conditions, and the page that shows it.

Verdicts are checked against a second judge written here, which hands the same conditions to Python
and takes its intervals from scipy, and against worlds whose verdict is known by thought.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import claims_ledger as ledger
import numpy as np
import pytest
import smslib_claims as pages
import smslib_results as results
import yaml
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from smslib import holdouts, sources

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "book" / "results"
CLAIMS = ledger.load(RESULTS / "claims.yml")
TESTABLE = [claim for claim in CLAIMS.values() if not claim.single]
ELSEWHERE = [claim for claim in CLAIMS.values() if claim.command]
SINGLE = [claim for claim in CLAIMS.values() if claim.single]
PUBLISHED = yaml.safe_load((RESULTS / "paper_values.yml").read_text())
METHODS = ("vae", "beta-vae", "ivae", "svae", "svae+")
SETTINGS = {
    "table1": r"",
    "table4": r"\.p\d+",
    "table5": r"\.s[\d.]+",
    "table6": r"\.e\d",
    "table7": r"\.s[\d.]+-[\d.]+",
    "table8": r"\.e\d-\d",
    "table10": r"\.n\d+",
    "figure4": r"\.alpha\d+",
}
SCORES = (
    "mcc mcc_spearman mcc_within r2 r2_cv precision recall f1 average_precision shd n_edges "
    "signed_precision signed_recall signed_f1 released_f1 mcc_new i_nll floor i_nll_gap "
    "validation_elbo calibration dci_disentanglement dci_completeness epochs fit_cpu_seconds"
).split()


# ------------------------------------------------------------------ hand-made stores


def put(folder, experiment, runs, *, seeds=(0, 1, 2)):
    """Store ``{prefix.method.score: values}`` with summaries from scipy, as the benchmark does."""
    path = folder / f"{experiment}.json"
    found = json.loads(path.read_text())["values"] if path.is_file() else {}
    for key, values in runs.items():
        found |= {key: list(values), f"{key}.mean": float(np.mean(values))}
        found |= dict(zip((f"{key}.low", f"{key}.high"), student(values), strict=True))
        found[f"{key.rpartition('.')[0]}.seeds"] = list(seeds)[: len(values)]
    record = {"commit": "feed", "dirty": False, "date": "2026-01-01", "wall_seconds": 1.0}
    record |= {"python": "3", "torch": "2", "command": "make bench"}
    path.write_text(json.dumps({"values": found, "provenance": record}))


def student(values):
    if len(values) < 2:
        return None, None
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(low), float(high)


@pytest.fixture
def store(tmp_path):
    runs = {
        "smslib.svae+.mcc": [0.9, 0.8, 0.85],
        "smslib.svae.mcc": [0.7, 0.75, 0.65],
        "smslib.ivae.mcc": [0.85, 0.6, 0.9],
        "smslib.svae+.i_nll": [300.0, 301.0, 302.0],
        "smslib.svae.i_nll": [304.0, 306.0, 308.0],
    }
    put(tmp_path, "table1", runs)
    put(tmp_path, "table1", {"smslib.vae.mcc": [0.5]})
    put(tmp_path, "table1", {"smslib.pca.mcc": [0.4, 0.5]}, seeds=(8, 9))
    shutil.copy(RESULTS / "paper_values.yml", tmp_path)
    return ledger.Store(tmp_path)


def evaluate(text, store, arm="smslib"):
    return ledger.evaluate(text, store, arm)


def test_a_score_that_some_runs_lack_is_paired_by_its_own_seeds(tmp_path):
    runs = {"smslib.svae+.i_nll": [9.0, 8.0], "smslib.ivae.i_nll": [5.0, 6.0, 7.0]}
    put(tmp_path, "table1", runs, seeds=(0, 1, 2))
    path = tmp_path / "table1.json"
    stored = json.loads(path.read_text())
    stored["values"] |= {"smslib.svae+.seeds": [0, 1, 2], "smslib.svae+.i_nll.seeds": [1, 2]}
    path.write_text(json.dumps(stored))
    found = ledger.Store(tmp_path).gain("table1", "smslib", "i_nll", "svae+", "ivae")
    assert found == ((6 - 9) + (7 - 8)) / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3 - 4 / 8", 6.5),
        ("-(2 - 5)", 3),
        ("abs(1 - 3) + min(4, 2, 3) + max(1, 7) + min(5)", 16),
        ("1 < 2 <= 2 and not 3 < 3 or 0 > 1", True),
        ("1 < 2 < 2", False),
        ("all(1 < 2, 3 >= 3)", True),
        ("any(2 < 1, 3 > 3)", False),
        ('value("table1", "{arm}.svae+.mcc.mean")', 0.85),
        ('mean("table1", "{arm}", "mcc", "svae")', 0.7),
        ('paper("table1", "svae+", "mcc")', 0.88),
        ('paper("table5", "s0.2.svae+", "i_nll")', 309.45),
        ('gain("table1", "{arm}", "mcc", "svae+", "svae")', 0.15),  # .2, .05, .2
        ('gain("table1", "{arm}", "mcc", "svae+", "ivae")', 0.2 / 3),  # .05, .2, -.05
        ('gain("table1", "{arm}", "mcc", "svae+", "svae", "ivae")', 0.2 / 3),
        ('gain("table1", "{arm}", "i_nll", "svae+", "svae")', 5.0),  # less is better
        ('wins("table1", "{arm}", "mcc", "svae+", "svae")', 1.0),
        ('wins("table1", "{arm}", "mcc", "svae+", "ivae", "svae")', 2 / 3),
        ('wins("table1", "{arm}", "i_nll", "svae", "svae+")', 0.0),
        ('gain("table1", "{arm}", "mcc", "svae+", "vae")', 0.4),  # seed 0 alone is shared
    ],
)
def test_expressions_worked_by_hand(store, text, expected):
    found = evaluate(text, store)
    assert found == pytest.approx(expected)
    assert isinstance(found, bool) == isinstance(expected, bool)


def test_intervals_of_gains_are_students(store):
    differences = [0.2, 0.05, 0.2]
    low, high = student(differences)
    text = 'gain("table1", "{arm}", "mcc", "svae+", "svae")'
    assert evaluate(text.replace("gain", "gain_low"), store) == pytest.approx(low)
    assert evaluate(text.replace("gain", "gain_high"), store) == pytest.approx(high)
    assert ledger.interval(text, store, "smslib") == pytest.approx((low, high))


def test_of_several_rivals_the_least_end_counts(store):
    ends = [student(d) for d in ([0.2, 0.05, 0.2], [0.05, 0.2, -0.05])]
    text = 'gain("table1", "{arm}", "mcc", "svae+", "svae", "ivae")'
    expected = tuple(min(pair) for pair in zip(*ends, strict=True))
    assert ledger.interval(text, store, "smslib") == pytest.approx(expected)


def test_only_a_mean_or_a_gain_by_itself_is_shown_with_an_interval(store):
    assert ledger.interval('mean("table1", "{arm}", "mcc", "svae")', store, "smslib") is not None
    assert ledger.interval('mean("table1", "{arm}", "mcc", "vae")', store, "smslib") is None
    assert ledger.interval('1 - mean("table1", "{arm}", "mcc", "svae")', store, "smslib") is None
    assert ledger.interval('paper("table1", "svae", "mcc")', store, "smslib") is None


FOREIGN = [
    "().__class__",
    "value.__globals__",
    '__import__("os")',
    'open("x")',
    'eval("1")',
    "store",
    "True",
    "'text'",
    "[1, 2]",
    "[x for x in (1, 2)]",
    "min(x for x in (1, 2))",
    "(lambda: 1)()",
    "1 if 2 else 3",
    "2 ** 9",
    "1 // 2",
    "5 % 2",
    "~1",
    "+1",
    "1 == 1",
    "1 in (1, 2)",
    "1 is 1",
    "2j",
    "b'x'",
    "...",
    "(x := 1)",
    "f'{1}'",
    "min(*(1, 2))",
    "min(1, 2, key=abs)",
    'value(experiment="table1", key="x")',
    'value("a", "b")["c"]',
    "min(value)",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_anything_else_is_refused_before_it_is_evaluated(text):
    with pytest.raises(ledger.LedgerError, match="is not of the language of conditions"):
        ledger.parse(text, "smslib")
    with pytest.raises(ledger.LedgerError, match="is not of the language of conditions"):
        ledger.parse(f"1 < 2 or 1 < {text}", "smslib")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 +", "cannot read '1 \\+'"),
        ("import os", "cannot read"),
        ("\0", "cannot read"),
        ('value("table1")', "missing a required argument: 'key'"),
        ('gain("table1", "smslib", "mcc", "svae+")', "missing a required argument: 'rival'"),
        ("abs(1, 2)", "too many positional arguments"),
        ("max()", "missing a required argument: 'first'"),
        ("value(1, 2)", "a lookup takes texts in quotes"),
        ('value("table1", abs(1))', "a lookup takes texts in quotes"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ledger.LedgerError, match=message):
        ledger.parse(text, "smslib")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / (2 - 2)", "divides by zero for the arm smslib"),
        ('value("table1", "{arm}.svae+.mcc")', "not a number; name one, such as its .mean"),
        ('paper("table1", "svae+", "mc")', "no published table1.svae\\+.mc: there is no 'mc'"),
        ('paper("table3", "svae+", "mcc")', "there is no 'table3'"),
    ],
)
def test_numbers_that_cannot_be_are_refused(store, text, message):
    with pytest.raises(ledger.LedgerError, match=message):
        evaluate(text, store)


def test_runs_need_a_value_for_each_seed(store):
    put(store.folder, "table4", {"smslib.p5.svae.mcc": [0.1, 0.2]})
    put(store.folder, "table4", {"smslib.p5.svae.r2": [0.1, 0.2, 0.3]})
    with pytest.raises(ledger.LedgerError, match="one value a seed"):
        evaluate('gain("table4", "smslib.p5", "mcc", "svae", "svae")', store)


@given(st.recursive(st.integers(-9, 9).map(str), lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    st.tuples(st.sampled_from(("min", "max")), inner, inner).map(
        lambda t: f"{t[0]}({t[1]}, {t[2]})"
    ),
    inner.map(lambda t: f"abs({t})"),
)))  # fmt: skip
def test_arithmetic_is_that_of_python(text):
    assert ledger.evaluate(text, ledger.Store(Path()), "smslib") == eval(text)


@given(st.text(alphabet="abs()min{arm}.,'\"[]x1 +-<>=_:", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        found = ledger.evaluate(text, ledger.Store(Path()), "smslib")
    except ledger.LedgerError:
        return
    assert isinstance(found, int | float)


# ------------------------------------------------------------------ verdicts


def claim(reproduced, partly="", **more):
    return ledger.Claim("C01", "claim", "source", reproduced=reproduced, partly=partly, **more)


MCC = 'mean("table1", "{arm}", "mcc", "svae+")'


@pytest.mark.parametrize(
    ("reproduced", "partly", "status"),
    [
        (f"{MCC} > 0.8", f"{MCC} > 0.9", "reproduced"),
        (f"{MCC} > 0.9", f"{MCC} > 0.8", "partly"),
        (f"{MCC} > 0.9", f"{MCC} > 0.86", "not reproduced"),
        (f"{MCC} > 0.9", "", "not reproduced"),
        ('mean("table9", "{arm}", "mcc", "svae+") > 0', "", "not run yet"),
        ('mean("table1", "{arm}", "mcc", "beta-vae") > 0', "", "not run"),
        ('gain_low("table1", "{arm}", "mcc", "svae+", "vae") > 0', "", "not run"),
        ('gain("table1", "{arm}", "mcc", "svae+", "pca") > 0', "", "not run"),
        ('low("table1", "{arm}", "mcc", "vae") > 0', "", "not run"),
    ],
)
def test_each_status_comes_about(store, reproduced, partly, status):
    assert ledger.judge(claim(reproduced, partly), "smslib", store).status == status


@pytest.mark.parametrize(
    "text",
    ['1 < 2 or mean("table9", "x", "mcc", "vae") > 0', 'any(1 < 2, value("table9", "x") > 0)'],
)
def test_no_verdict_rests_on_a_part_of_the_numbers(store, text):
    assert ledger.judge(claim(text), "smslib", store).status == "not run yet"
    assert ledger.judge(claim("1 < 2", text), "smslib", store).status == "not run yet"


def test_arms_are_judged_apart(store):
    put(store.folder, "table5", {"released.svae+.mcc": [0.5, 0.6], "smslib.svae+.mcc": [0.9, 0.8]})
    about = claim('mean("table5", "{arm}", "mcc", "svae+") > 0.7')
    found = {arm: ledger.judge(about, arm, store).status for arm in ledger.ARMS}
    assert found == {
        "released": "not reproduced",
        "corrected": "not run",
        "smslib": "reproduced",
    }


def test_a_run_that_is_not_finite_is_no_run(store):
    put(store.folder, "table4", {"smslib.svae.f1": [0.5, 0.6], "smslib.ivae.f1": [0.5, 0.6]})
    content = json.loads((store.folder / "table4.json").read_text())
    content["values"] |= {"smslib.ivae.f1": [0.5, None], "smslib.ivae.f1.mean": None}
    (store.folder / "table4.json").write_text(json.dumps(content))
    for text in (
        'gain("table4", "{arm}", "f1", "svae", "ivae")',
        'mean("table4", "{arm}", "f1", "ivae")',
    ):
        found = ledger.judge(claim(f"{text} > 0"), "smslib", store)
        assert found.status == "not run"
        assert "finite" in found.reason


def test_an_untestable_claim_gives_its_reason(store):
    about = ledger.Claim("C01", "claim", "source", untestable="no data")
    assert ledger.judge(about, "smslib", store) == ledger.Verdict(
        "cannot be tested here", "no data"
    )


def elsewhere(reproduced=""):
    more = {"needs": "a large screen", "command": "run it", "reproduced": reproduced}
    return ledger.Claim("C01", "claim", "source", **more)


def test_a_claim_about_what_is_not_here_is_judged_once_it_has_been_run(store):
    text = 'gain("big", "screen.corrected.group", "i_nll_after", "svae+", "vae") > 0'
    not_here = ledger.Verdict("not run here", "a large screen")
    for about in (elsewhere(), elsewhere(text)):
        assert ledger.judge(about, "smslib", store) == not_here
    keys = [f"screen.corrected.group.{method}.i_nll_after" for method in ("svae+", "vae")]
    put(store.folder, "big", dict(zip(keys, ([100.0, 101.0], [102.0, 104.0]), strict=True)))
    later = ledger.Store(store.folder)
    assert ledger.judge(elsewhere(text), "smslib", later).status == "reproduced"
    assert ledger.judge(elsewhere(f"not {text}"), "smslib", later).status == "not reproduced"
    missing = text.replace("vae", "ivae")
    assert ledger.judge(elsewhere(missing), "smslib", later).status == "not run"


def test_a_condition_is_no_number(store):
    with pytest.raises(ledger.LedgerError, match="is a number, 3; a condition compares it"):
        ledger.judge(claim("1 + 2"), "smslib", store)


# ------------------------------------------------------------------ reading a ledger

ENTRY = {"id": "C01", "claim": "c", "source": "s", "reproduced": "1 < 2"}
FIGURE = {"label": "x", "value": "1", "digits": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"C01": ENTRY}, "holds dict; expected a list of claims"),
        ([ENTRY, "C02"], "holds list; expected a list of claims"),
        ([ENTRY, ENTRY], "claim 'C01' stands where 'C02' should"),
        ([{**ENTRY, "id": None}], "claim None stands where 'C01' should"),
        ([{**ENTRY, "source": None}], "claim C01: missing \\['source'\\], unknown \\[\\]"),
        ([{**ENTRY, "parly": "1 < 2"}], "unknown \\['parly'\\]"),
        ([{**ENTRY, "untestable": "no"}], "either 'untestable', or 'reproduced' .* not both"),
        ([{**ENTRY, "reproduced": ""}], "either 'untestable', or 'reproduced' .* not both"),
        ([{**ENTRY, "command": "run"}], "both 'command' and 'needs', or neither"),
        ([{**ENTRY, "needs": "more"}], "both 'command' and 'needs', or neither"),
        (
            [{**ENTRY, "needs": "n", "command": "c", "partly": 'value("a", "{arm}.b") > 0'}],
            "judged once, but 'value.*' depends on the arm",
        ),
        ([{**ENTRY, "partly": "os.system"}], "'os.system' is not of the language"),
        ([{**ENTRY, "show": [{**FIGURE, "value": "x"}]}], "'x' is not of the language"),
        ([{**ENTRY, "show": [{"label": "x"}]}], "C01, show: missing \\['value', 'digits'\\]"),
    ],
)
def test_a_ledger_is_checked_when_it_is_read(tmp_path, content, message):
    (tmp_path / "claims.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(ledger.LedgerError, match=message):
        ledger.load(tmp_path / "claims.yml")


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "claims.yml").write_text("- {")
    for name in ("claims.yml", "none.yml"):
        with pytest.raises(ledger.LedgerError, match=f"cannot read {name}"):
            ledger.load(tmp_path / name)


# ------------------------------------------------------------------ the book's own ledger


def calls(text):
    """Every call in a condition, found without the ledger."""
    found = [node for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Call)]
    return [(n.func.id, *(a.value for a in n.args)) for n in found if n.func.id in ledger.LOOKUPS]


def test_the_book_has_claims_of_every_kind():
    assert len(TESTABLE) >= 15
    assert len(CLAIMS) > len(TESTABLE)
    assert len(SINGLE) > len(ELSEWHERE) >= 5
    assert all(about.partly and about.criterion and about.show for about in TESTABLE)
    assert all(about.show for about in ELSEWHERE)
    assert {name for about in TESTABLE for name in about.experiments} == set(SETTINGS)


@pytest.mark.parametrize("about", TESTABLE, ids=lambda about: about.id)
def test_a_claim_names_only_what_the_benchmark_stores(about):
    for name, experiment, *rest in (call for text in about.expressions for call in calls(text)):
        if name == "paper":
            assert ledger.Store(RESULTS).paper(experiment, *rest)
            continue
        prefix, score, *methods = rest
        assert re.fullmatch(r"\{arm\}" + SETTINGS[experiment], prefix), prefix
        assert score in SCORES
        assert set(methods) <= set(METHODS)


@pytest.mark.parametrize("about", SINGLE, ids=lambda about: about.id)
def test_a_claim_about_screens_names_only_what_the_studies_store(about):
    scores = {"i_nll_after", "validation_elbo", "average_precision_gate"}
    for _, experiment, prefix, score, *methods in (c for t in about.expressions for c in calls(t)):
        study = holdouts.STUDIES[experiment.removeprefix("holdouts-")]()
        known = {f"{c['dataset']}.{c['arm']}.{c['group']}.{c['method']}" for c in study}
        assert {f"{prefix}.{method}" for method in methods} <= known
        assert score in scores


@pytest.mark.parametrize("about", ELSEWHERE, ids=lambda about: about.id)
def test_the_command_of_a_claim_exists_and_makes_what_judges_it(about):
    made = set()
    for part in about.command.split(" && "):
        module, *words = part.removeprefix("python -m smslib.").split()
        if module == "perturbseq":
            assert words[0] in ("fetch", "prepare")
            assert words[1] in sources.SOURCES
        else:
            assert (module, words[0] in holdouts.STUDIES) == ("holdouts", True)
            made.add(f"holdouts-{words[0]}")
    texts = [text for text in (about.reproduced, about.partly) if text]
    assert {call[1] for text in texts for call in calls(text)} == made


@pytest.mark.parametrize("best", METHODS)
def test_claims_about_screens_follow_whoever_leads(tmp_path, best):
    """Where one method leads everywhere, only what says so is reproduced."""
    rng = np.random.default_rng(0)
    for experiment, prefix, score, method in needed(t for a in ELSEWHERE for t in a.expressions):
        lead = 5.0 * (method == best) * (-1 if score == "i_nll_after" else 1)
        runs = {f"{prefix}.{method}.{score}": lead + 0.01 * rng.standard_normal(3)}
        put(tmp_path, experiment, runs)
    found = {a.id for a in ELSEWHERE if judged(a, tmp_path) == "reproduced"}
    assert found == {"svae+": {"C30", "C31", "C33"}}.get(best, set())


def judged(about, folder):
    return ledger.judge(about, "smslib", ledger.Store(folder)).status


def test_both_models_with_plain_shifts_must_lead_for_c32(tmp_path):
    rng, levels = np.random.default_rng(0), {"ivae": 9.0, "svae": 8.0}
    prefix = "norman.corrected.mmd30"
    for method in METHODS:
        level = levels.get(method, 1.0) + 0.01 * rng.standard_normal(3)
        put(tmp_path, "holdouts-norman", {f"{prefix}.{method}.validation_elbo": level})
    assert judged(CLAIMS["C32"], tmp_path) == "reproduced"


# Worlds: what every key of the ledger would hold if some story were true.


def needed(texts):
    """Experiment, prefix, score and method of every stored number the expressions name."""
    found = {call[1:] for text in texts for call in calls(text) if call[0] != "paper"}
    return {(e, p, s, m) for e, p, s, *methods in found for m in methods}


NEEDED = sorted(needed(text for about in TESTABLE for text in about.expressions))
COLUMNS = {"mcc_spearman": "spearman", "released_f1": "f1", "mcc_new": "mcc"}


def published(experiment, prefix, score, method):
    rows = PUBLISHED[experiment]["rows"]
    setting = prefix.removeprefix("{arm}").lstrip(".")
    if experiment == "table4":
        return rows[method][setting]["mean"]
    row = f"{setting}.{method}".lstrip(".")
    return rows[row][COLUMNS.get(score, score)]["mean"]


def build_world(folder, level, arm="smslib", spread=1e-6, seeds=3):
    """Store runs that scatter around ``level(experiment, prefix, score, method)``."""
    rng = np.random.default_rng(0)
    runs = {}
    for key in NEEDED:
        experiment, prefix, score, method = key
        name = f"{prefix.replace('{arm}', arm)}.{method}.{score}"
        noise = spread * rng.standard_normal(seeds)
        runs.setdefault(experiment, {})[name] = level(*key) + noise
    for experiment, values in runs.items():
        put(folder, experiment, values, seeds=range(seeds))
    shutil.copy(RESULTS / "paper_values.yml", folder)
    return ledger.Store(folder)


def in_lower(score, value):
    return -value if score in {"i_nll", "i_nll_after"} else value


def equal(experiment, prefix, score, method):
    """No method differs from another, no setting from another."""
    return 300.0 if score == "i_nll" else 0.8


def reversed_order(experiment, prefix, score, method):
    """The last is first, in methods and in settings."""
    centre = 700.0 if score == "i_nll" else 0.5
    return 2 * centre - published(experiment, prefix, score, method)


def far_ahead(experiment, prefix, score, method):
    """The sparse model wins by a wide margin wherever it is compared, in domain or out."""
    rank = METHODS.index(method) / 4
    return 400.0 - 90.0 * rank if score == "i_nll" else 0.3 + 0.69 * rank


def jagged(experiment, prefix, score, method):
    """Scores jump from setting to setting, whatever the method."""
    place = sum(map(ord, experiment + prefix)) % 7
    return 300.0 + 10 * place if score == "i_nll" else 0.2 + 0.1 * place


WORLDS = (equal, reversed_order, far_ahead, jagged)


def statuses(store, arm="smslib"):
    return {about.id: ledger.judge(about, arm, store).status for about in TESTABLE}


def test_if_runs_gave_the_published_values_every_claim_would_be_reproduced(tmp_path):
    found = statuses(build_world(tmp_path, published))
    assert {name: s for name, s in found.items() if s != "reproduced"} == {}


def test_numbers_shown_side_by_side_are_of_the_same_quantity(tmp_path):
    """Where runs give the published values, both columns of the table agree."""
    world = build_world(tmp_path, published)
    pairs = [(about.id, f) for about in TESTABLE for f in about.show if f.paper]
    for name, figure in pairs:
        ours, theirs = (evaluate(text, world) for text in (figure.value, figure.paper))
        assert ours == pytest.approx(theirs, abs=1e-4), f"{name}, {figure.label}"


def test_every_claim_fails_in_some_world(tmp_path):
    found = []
    for level in WORLDS:
        (tmp_path / level.__name__).mkdir()
        found.append(statuses(build_world(tmp_path / level.__name__, level)))
    never = [name for name in found[0] if all(world[name] == "reproduced" for world in found)]
    assert never == []


def test_if_all_methods_were_equal_no_lead_would_be_reproduced(tmp_path):
    found = statuses(build_world(tmp_path, equal, spread=0.01, seeds=5))
    about_leads = [c.id for c in TESTABLE if re.match(r"(min\()?gain_low", c.reproduced)]
    assert len(about_leads) >= 10
    assert {found[name] for name in about_leads} <= {"partly", "not reproduced"}


# ------------------------------------------------------------------ a second judge


class Second:
    """Judges by Python and scipy: shares nothing with the ledger but its text."""

    def __init__(self, folder, arm):
        self.folder, self.arm = folder, arm

    def stored(self, experiment):
        content = json.loads((self.folder / f"{experiment}.json").read_text())
        return content["values"] | content.get("by_seed", {})

    def seeds(self, values, prefix, method, score):
        return values.get(f"{prefix}.{method}.{score}.seeds", values[f"{prefix}.{method}.seeds"])

    def pairs(self, experiment, prefix, score, better, *rivals):
        values = self.stored(experiment)
        frames = [
            dict(
                zip(
                    self.seeds(values, prefix, m, score),
                    values[f"{prefix}.{m}.{score}"],
                    strict=True,
                )
            )
            for m in (better, *rivals)
        ]
        for other in frames[1:]:
            seeds = [seed for seed in frames[0] if seed in other]
            yield (
                [in_lower(score, frames[0][s]) for s in seeds],
                [in_lower(score, other[s]) for s in seeds],
            )

    def test(self, *names):
        found = []
        for ours, theirs in self.pairs(*names):
            ends = (
                stats.ttest_rel(ours, theirs).confidence_interval(0.95) if len(ours) > 2 else None
            )
            found.append((np.mean(ours) - np.mean(theirs), *(ends or ())))
        return found

    def names(self):
        def runs(e, p, s, m):
            return self.stored(e)[f"{p}.{m}.{s}"]

        return {
            "__builtins__": {},
            "abs": abs,
            "min": min,
            "max": max,
            "all": lambda *items: all(items),
            "any": lambda *items: any(items),
            "mean": lambda *names: np.mean(runs(*names)) + 0.0,
            "low": lambda *names: student(runs(*names))[0] + 0.0,
            "high": lambda *names: student(runs(*names))[1] + 0.0,
            "gain": lambda *names: min(test[0] for test in self.test(*names)),
            "gain_low": lambda *names: min(test[1] for test in self.test(*names)),
            "paper": lambda t, r, c: PUBLISHED[t]["rows"][r][c]["mean"],
        }

    def judge(self, about):
        if about.untestable:
            return "cannot be tested here"
        if about.command and not about.reproduced:
            return "not run here"
        texts = [t.replace("{arm}", self.arm) for t in (about.reproduced, about.partly)]
        experiments = {call[1] for text in texts for call in calls(text) if call[0] != "paper"}
        if not all((self.folder / f"{name}.json").is_file() for name in experiments):
            return "not run here" if about.command else "not run yet"
        try:
            met = [eval(text, self.names()) for text in texts]
        except (KeyError, IndexError, TypeError):  # no key, no pairs, or a null
            return "not run"
        return "reproduced" if met[0] else "partly" if met[1] else "not reproduced"


@pytest.mark.parametrize("seed", range(4))
def test_the_second_judge_agrees_in_worlds_of_chance(tmp_path, seed):
    rng = np.random.default_rng(seed)
    scale = rng.choice([0.02, 0.3])

    def chance(experiment, prefix, score, method):
        base = published(experiment, prefix, score, method)
        return base + scale * rng.standard_normal() * (20 if score == "i_nll" else 1)

    world = build_world(tmp_path, chance, spread=0.05, seeds=4)
    second = Second(tmp_path, "smslib")
    assert statuses(world) == {about.id: second.judge(about) for about in TESTABLE}


@pytest.mark.parametrize("arm", ledger.ARMS)
def test_the_second_judge_agrees_on_the_books_own_results(arm):
    store, second = ledger.Store(RESULTS), Second(RESULTS, arm)
    found = {name: ledger.judge(about, arm, store).status for name, about in CLAIMS.items()}
    assert found == {name: second.judge(about) for name, about in CLAIMS.items()}


# ------------------------------------------------------------------ the page

CONF = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_nb", "smslib_results", "smslib_provenance", "smslib_claims"]
nb_execution_mode = "off"
html_theme = "basic"
exclude_patterns = ["out"]
"""
TABLE = "```{claims-table}\n```"


def lay_out(root, page_texts):
    (root / "book" / "results").mkdir(parents=True, exist_ok=True)
    (root / "conf.py").write_text(CONF.format(ext=str(ROOT / "book" / "_ext")))
    (root / "build.json").write_text(json.dumps({"commit": "feed", "dirty": False}))
    names = "\n".join(page_texts)
    for name, text in {**page_texts, "index": f"```{{toctree}}\n{names}\n```"}.items():
        (root / f"{name}.md").write_text(f"# Title\n\n{text}\n")


def build(root):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ".", "out"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def parse(root, name):
    return BeautifulSoup((root / "out" / f"{name}.html").read_text(), "html.parser")


def shown(page):
    """Statuses in the table, by claim and arm, as a reader finds them."""
    found = {}
    for row in page.select("table.claims-table tbody tr"):
        if row.get("id"):
            name = row["id"].removeprefix("claim-").upper()
        elif row.th.get_text() == "status":
            found[name] = [label.get_text() for label in row.select(".claim-status")]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The book's own ledger, its own results, and one page that quotes claims."""
    root = tmp_path_factory.mktemp("claims")
    lay_out(root, {"claims": TABLE, "other": "See {claim}`C03` and {claim}`C31`.", "plain": "No."})
    for file in (*RESULTS.glob("*.json"), *RESULTS.glob("*.yml")):
        shutil.copy(file, root / "book" / "results")
    done = build(root)
    assert done.stderr == ""
    return root


def test_the_table_shows_the_status_of_every_claim_in_every_arm(site):
    second = [Second(site / "book" / "results", arm) for arm in ledger.ARMS]
    expected = {
        name: [second[0].judge(about)]
        if about.single
        else [judge.judge(about) for judge in second]
        for name, about in CLAIMS.items()
    }
    assert shown(parse(site, "claims")) == expected


def test_the_counts_add_up(site):
    rows = parse(site, "claims").select("table.claims-counts tbody tr")
    assert [row.th.get_text() for row in rows] == list(ledger.STATUSES)
    columns = zip(*([int(td.get_text()) for td in row.select("td")] for row in rows), strict=True)
    assert [sum(column) for column in columns] == [len(CLAIMS)] * len(ledger.ARMS)


def test_a_row_holds_words_conditions_and_numbers(site):
    page = parse(site, "claims")
    row = page.select_one("tr#claim-c01")
    assert "Of the five methods, sVAE+" in row.th.get_text()
    assert row.th["colspan"] == "5"
    assert 'gain_low("table1", "{arm}", "mcc", "svae+"' in row.select_one("details code").string
    assert "p" not in [parent.name for parent in row.details.parents]
    figures = row.find_next_sibling("tr").find_next_sibling("tr")
    assert figures.th.get_text() == "MCC, sVAE+"
    assert figures.td.get_text() == "0.88"


def test_every_row_fills_the_table(site):
    for row in parse(site, "claims").select("table.claims-table tr"):
        assert sum(int(cell.get("colspan", 1)) for cell in row.select("th, td")) == 5


def test_a_badge_links_to_its_row_and_says_the_claim(site):
    links = parse(site, "other").select("p > a:has(.claim-badge)")
    assert [link["href"] for link in links] == ["claims.html#claim-c03", "claims.html#claim-c31"]
    assert [link["title"] for link in links] == [CLAIMS["C03"].claim, CLAIMS["C31"].claim]
    assert links[1].get_text() == "C31 not run here"


def test_what_was_not_run_here_comes_with_its_command_and_what_was_run(site):
    row = parse(site, "claims").select_one("tr#claim-c33")
    verdict = row.find_next_sibling("tr")
    assert verdict.select_one(".claim-command").get_text() == CLAIMS["C33"].command
    assert "Run: python -m smslib.perturbseq fetch" in verdict.get_text()
    shown_beside = verdict.find_next_sibling("tr")
    assert shown_beside.th.get_text() == CLAIMS["C33"].show[0].label
    published, ours = shown_beside.select("td")
    assert (published.get_text(), ours["colspan"]) == ("–", "3")
    value = evaluate(CLAIMS["C33"].show[0].value, ledger.Store(RESULTS))
    assert ours.get_text().startswith(f"{value:.2f} [")


def test_pages_that_quote_claims_tell_where_their_numbers_come_from(site):
    assert "table1" in parse(site, "other").select_one("footer.provenance").get_text()
    assert "table1" not in parse(site, "plain").select_one("footer.provenance").get_text()


SMALL = """
- {id: C01, claim: "is <large>", source: Table 1, criterion: it is above a half,
   reproduced: 'mean("table1", "{arm}", "mcc", "svae+") > 0.5',
   partly: 'mean("table1", "{arm}", "mcc", "svae+") > 0.3',
   show: [{label: MCC, value: 'mean("table1", "{arm}", "mcc", "svae+")', digits: 1}]}
"""


def small(root, page_texts, ledger_text=SMALL):
    lay_out(root, page_texts)
    (root / "book" / "results" / "claims.yml").write_text(ledger_text)
    (root / "book" / "results" / "paper_values.yml").write_text("{}")
    return root / "book" / "results"


def test_badges_and_rows_follow_the_results(tmp_path):
    folder = small(tmp_path, {"claims": TABLE, "other": "{claim}`C01`"})
    assert build(tmp_path).stderr == ""
    assert parse(tmp_path, "other").select_one(".claim-badge").get_text() == "C01 not run yet"
    runs = {"released.svae+.mcc": [0.4], "corrected.svae+.mcc": [0.6], "smslib.svae+.mcc": [-0.9]}
    put(folder, "table1", runs | {"smslib.svae+.mcc": [0.8, 1.0]})
    assert build(tmp_path).stderr == ""
    expected = "C01 partly: as released reproduced: corrected, smslib"
    assert parse(tmp_path, "other").select_one(".claim-badge").get_text() == expected
    page = parse(tmp_path, "claims")
    assert shown(page) == {"C01": ["partly", "reproduced", "reproduced"]}
    cells = [cell.get_text() for cell in page.select("table.claims-table tr")[-1].select("td")]
    low, high = student([0.8, 1.0])
    assert cells == ["–", "0.4", "0.6", f"0.9 [{low:.1f}, {high:.1f}]".replace("-", "−")]
    put(folder, "table1", {"smslib.svae+.mcc": [0.1, 0.2]})
    assert build(tmp_path).stderr == ""
    found = parse(tmp_path, "other").select_one(".claim-not-reproduced").get_text()
    assert found == "not reproduced: smslib"


def test_an_unknown_claim_or_a_badge_without_a_row_is_a_warning(tmp_path):
    small(tmp_path, {"other": "{claim}`C01` and {claim}`C02`"})
    done = build(tmp_path)
    assert done.returncode != 0
    assert "no 'C02' in claims.yml; nearest known: ['C01" in done.stderr
    assert "reference target not found: claim-c01" in done.stderr
    assert "other.md" in done.stderr


def test_an_unreadable_ledger_is_a_warning(tmp_path):
    small(tmp_path, {"claims": TABLE}, SMALL.replace("> 0.5", "> open"))
    done = build(tmp_path)
    assert done.returncode != 0
    assert "claims-table directive: 'open' is not of the language" in done.stderr


def test_a_number_without_runs_is_a_dash(store):
    missing = 'mean("table9", "{arm}", "mcc", "svae")'
    for text, expected in ((missing, "–"), ("", "–"), ("1 - 1.257", "−0.26")):
        assert [node.astext() for node in pages.number(text, 2, store, "smslib")] == [expected]


# ------------------------------------------------------------------ published values


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table4.beta-vae.p15", "0.58 ± 0.08"),
        ("table5.s0.2.svae+.mcc", "0.83"),
        ("table5.s0.9.svae.i_nll", "333.98"),
        ("table6.e2.ivae.i_nll.mean", "356.84"),
        ("table7.s0.7-0.99.svae.i_nll", "710.88"),
        ("table8.e5-7.svae+.mcc", "0.46"),
        ("table10.n12.svae+.mcc", "0.85"),
        ("figure4.alpha30.svae+.i_nll", "317.0"),
        ("figure4.alpha40.svae+.r2", "0.79"),
    ],
)
def test_published_values_of_every_table_can_be_quoted(name, text):
    assert results.published(RESULTS, name, "")[0] == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table5.s0.2.svae+.r2", "no 'r2' in table5.s0.2.svae\\+"),
        ("table5.s0.3.svae+.mcc", "no 's0.3.svae\\+' in table5; nearest known: \\['s0."),
        ("table5.s0.2.svae+.mcc.sd", "no 'sd' in table5.s0.2.svae\\+.mcc"),
        ("table5.mcc", "no '' in table5"),
    ],
)
def test_a_published_value_that_does_not_exist_is_named(name, message):
    with pytest.raises(results.Unknown, match=message):
        results.published(RESULTS, name, "")


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("table1", "table4")])
def test_tables_with_settings_have_a_row_for_each_setting_and_method(name):
    table = PUBLISHED[name]
    setting, methods = SETTINGS[name].lstrip("\\."), METHODS[2:]
    if name in ("table10", "figure4"):
        methods = METHODS[4:]
    rows = [row.rpartition(".") for row in table["rows"]]
    assert all(re.fullmatch(setting, place) and method in methods for place, _, method in rows)
    assert len(rows) == len({place for place, _, _ in rows}) * len(methods)
    for row in table["rows"].values():
        assert "mcc" in row
        assert all(cell.keys() == {"mean"} for cell in row.values())


def test_every_table_says_where_it_comes_from():
    assert list(PUBLISHED) == list(SETTINGS)
    for name, table in PUBLISHED.items():
        number = re.sub(r"(table|figure)", lambda m: f"{m[0].title()} ", name)
        assert f"{number} " in table["source"]
        assert table["evidence"] == ("digitised" if name == "figure4" else "read")
        assert all(
            column["digits"] >= 1 and column["label"] for column in table["columns"].values()
        )
