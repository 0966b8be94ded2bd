"""From text to page: normalising, comparing, executing what changed, staging, rendering."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat import v4
from pipeline import execute, files, nbval_plugin, pages, refresh, render, stage
from pipeline.compare import Tolerance, difference, output_differences
from pipeline.normalise import bridge_alt_text, normalise, quantise

from smslib import sources

ROOT = Path(__file__).resolve().parents[1]

TEXT = """---
jupytext:
  formats: ipynb,md:myst
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
{header}---

# A page

```{{code-cell}} ipython3
:tags: [parameters]

profile = "quick"
device = "cpu"  # or "cuda"
seed = 0
```

```{{code-cell}} ipython3
{code}
```
"""
CODE = "import os\nprint(f'{profile} {1 / 3:.6f} on {os.environ[\"OMP_NUM_THREADS\"]} thread')"


@pytest.fixture
def repository(tmp_path):
    """A tiny repository with one notebook; the path has a space on purpose."""
    root = tmp_path / "a book"
    for folder in ("notebooks/profiles", "book/results", "book/pipeline", "smslib"):
        (root / folder).mkdir(parents=True)
    write(root)
    shutil.copy(ROOT / "notebooks" / "jupytext.toml", root / "notebooks")
    (root / "notebooks/profiles/quick.yml").write_text("profile: quick\ndevice: cpu\nseed: 0\n")
    (root / "notebooks/profiles/full.yml").write_text("profile: full\ndevice: auto\nseed: 0\n")
    (root / "smslib/__init__.py").write_text("")
    return root


def write(root, code=CODE, *, header="", name="01_page"):
    source = root / "notebooks" / f"{name}.md"
    source.write_text(TEXT.format(code=code, header=header))
    return source


def page(root, profile="quick"):
    return execute.Page(root, root / "notebooks" / "01_page.md", profile)


def stream(text, name="stdout"):
    return v4.new_output("stream", name=name, text=text)


# ------------------------------------------------------------------ files


def test_a_file_is_written_only_when_its_content_differs(tmp_path):
    path = tmp_path / "deep" / "file"
    assert files.write_if_changed(path, b"one")
    os.utime(path, (1, 1))
    assert not files.write_if_changed(path, b"one")
    assert path.stat().st_mtime == 1
    assert files.write_if_changed(path, b"two")
    assert path.read_bytes() == b"two"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def crash(*_):
        raise OSError

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):  # noqa: PT011 - raised bare above
        files.write_atomic(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_mirroring_writes_what_is_new_and_deletes_what_is_stale(tmp_path):
    files.mirror({"a": b"1", "b/c": b"2"}, tmp_path)
    assert files.mirror({"b/c": b"2", "d": b"3"}, tmp_path) == ["a", "d"]
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"b/c", "d"}


# ------------------------------------------------------------------ normalising


def executed(*, papermill=True):
    cells = [
        v4.new_markdown_cell("text", metadata={"tags": [], "papermill": {"status": "completed"}}),
        v4.new_code_cell("seed = 1", execution_count=4, metadata={"tags": ["parameters"]}),
        v4.new_code_cell(
            "seed = 2", execution_count=5, metadata={"tags": ["injected-parameters"]}
        ),
        v4.new_code_cell(
            "seed",
            execution_count=9,
            metadata={"execution": {"iopub.execute_input": "now"}, "nbval": {"rtol": 0.1}},
            outputs=[
                stream("a"),
                stream("b"),
                v4.new_output("execute_result", data={"text/plain": "2"}, execution_count=9),
            ],
        ),
        v4.new_code_cell("never run"),
    ]
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python", "version": "3.11.7"},
        "papermill": {"duration": 1.2},
        "smslib": {"data": ["x"]},
    }
    return v4.new_notebook(cells=cells, metadata=metadata)


def test_what_the_run_leaves_behind_is_removed():
    clean = normalise(executed())
    assert [cell.source for cell in clean.cells] == ["text", "seed = 1", "seed", "never run"]
    assert [cell.get("id") for cell in clean.cells] == ["c000", "c001", "c002", "c003"]
    assert [cell.get("execution_count") for cell in clean.cells] == [None, 1, 2, None]
    assert [dict(cell.metadata) for cell in clean.cells] == [
        {},
        {"tags": ["parameters"]},
        {"nbval": {"rtol": 0.1}},
        {},
    ]
    assert set(clean.metadata) == {"kernelspec", "language_info", "smslib"}
    assert clean.metadata.language_info == {"name": "python"}
    joined, result = clean.cells[2].outputs
    assert joined.text == "ab"
    assert result.execution_count == 2


def test_normalising_is_idempotent_and_leaves_its_argument_alone():
    notebook = executed()
    before = pages.dump(notebook)
    once = normalise(notebook)
    assert pages.dump(notebook) == before
    assert pages.dump(normalise(once)) == pages.dump(once)


def png(size=(64, 64)):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (*size, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_figures_are_reduced_to_a_palette_on_white_and_no_further():
    from PIL import Image

    original = png()
    small = quantise(original, colours=128)
    image = Image.open(io.BytesIO(small))
    assert len(small) < len(original)
    assert image.mode == "P"
    assert image.size == (64, 64)
    assert len(image.getcolors()) <= 128
    assert quantise(small) == small


def test_the_alternative_text_reaches_the_renderer_without_replacing_one():
    shown = v4.new_output(
        "display_data",
        data={"image/png": ""},
        metadata={"image/png": {"alt": "A line that rises."}},
    )
    own = {"mystnb": {"image": {"alt": "mine"}}}
    cells = [
        v4.new_code_cell("", outputs=[shown]),
        v4.new_code_cell("", outputs=[shown], metadata=own),
    ]
    bridged = bridge_alt_text(v4.new_notebook(cells=[*cells, v4.new_markdown_cell("x")]))
    assert [c.metadata.get("mystnb", {}).get("image", {}).get("alt") for c in bridged.cells] == [
        "A line that rises.",
        "mine",
        None,
    ]
    assert "mystnb" not in cells[0].metadata


# ------------------------------------------------------------------ comparing

REALS = st.floats(min_value=1e-3, max_value=1e6)


@given(REALS, st.floats(-1e-4, 1e-4))
def test_a_real_may_move_within_the_tolerance(value, relative):
    moved = value * (1 + relative)
    assert difference(f"x = {value!r}", f"x = {moved!r}", Tolerance(rtol=1.01e-4)) is None


@given(REALS, st.floats(0.01, 10), st.sampled_from([-1, 1]))
def test_a_real_may_not_move_further(value, relative, sign):
    moved = value * (1 + relative) ** sign
    assert difference(f"x = {value:.17g}.", f"x = {moved:.17g}.", Tolerance(rtol=1e-3)) is not None


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("12 cells", "13 cells", False),
        ("12 cells", "12.0001 cells", True),
        ("-0.00", "0.00", True),
        ("1.5e-3", "0.0015", True),
        ("−0.25", "-0.25", True),
        ("nan", "nan", True),
        ("nan", "0.1", False),
        ("IFNGR1 0.5", "IFNGR2 0.5", False),
        ("x2 = 0.5", "x3 = 0.5", False),
        ("a    9.99\n-------", "a  9.991\n----", True),
        ("a 1.0\nb 2.0", "a 1.0", False),
        ("True", "False", False),
        ("<A at 0x7f3a2b4c>", "<A at 0x55aa66bb77>", True),
        ("1.0 2.0", "1.0", False),
        ("1,999.9 UMIs", "2,000.1 UMIs", True),
        ("1,999 UMIs", "2,000 UMIs", False),
        ("# -", "5 -", False),
    ],
)
def test_texts_are_compared_as_a_reader_would(stored, fresh, same):
    assert (difference(stored, fresh, Tolerance()) is None) == same


@pytest.mark.parametrize(("first", "second"), [("0.8", "0.7"), ("0.3", "0.4"), ("27.6", "27.5")])
def test_a_last_digit_may_move_by_a_tolerance_of_one(first, second):
    assert difference(first, second, Tolerance(rtol=0.0, atol=0.1)) is None
    assert difference(first, second, Tolerance(rtol=0.0, atol=0.099)) is not None


def test_a_difference_names_the_numbers():
    assert difference("mcc 0.91, r2 0.5", "mcc 0.95, r2 0.5", Tolerance()) == "0.91 became 0.95"
    assert difference("one\ntwo", "one\ntoo", Tolerance()) == "stored 'two', now 'too'"


def test_outputs_must_be_of_the_same_kinds_but_images_may_differ():
    image = [v4.new_output("display_data", data={"image/png": "a", "text/plain": "<Figure>"})]
    other = [v4.new_output("display_data", data={"image/png": "b", "text/plain": "<Figure>"})]
    assert output_differences(image, other, Tolerance()) == []
    assert output_differences(image, [], Tolerance()) == [
        "stored outputs are image/png, text/plain; the code now gives nothing"
    ]
    assert output_differences([stream("1"), stream(".5")], [stream("1.5")], Tolerance()) == []
    error = v4.new_output("error", ename="ValueError", evalue="3 cells", traceback=["..."])
    again = v4.new_output("error", ename="ValueError", evalue="4 cells", traceback=["..."])
    assert output_differences([error], [again], Tolerance()) == ["error: 3 became 4"]


# ------------------------------------------------------------------ nbval


def measured(text="MCC 0.8812 over 5 seeds\n", **metadata):
    source = "print(f'MCC {0.8812:.4f} over {5} seeds')"
    cell = v4.new_code_cell(source, execution_count=1, outputs=[stream(text)], metadata=metadata)
    return v4.new_notebook(cells=[cell])


def stripped():
    notebook = measured()
    notebook.cells[0].outputs = []
    return notebook


def unrun():
    notebook = measured()
    notebook.cells.append(v4.new_code_cell("2 + 2"))
    return notebook


def without_data():
    notebook = measured("something else\n")
    notebook.metadata["smslib"] = {"data": ["no-such-screen"]}
    return notebook


NOTEBOOKS = {
    "as_stored": measured(),
    "within": measured("MCC 0.8813 over 5 seeds\n"),
    "altered": measured("MCC 0.8912 over 5 seeds\n"),
    "altered_integer": measured("MCC 0.8812 over 6 seeds\n"),
    "own_tolerance": measured("MCC 0.8912 over 5 seeds\n", nbval={"rtol": 0.05}),
    "stripped": stripped(),
    "unrun": unrun(),
    "without_data": without_data(),
}


@pytest.fixture(scope="module")
def nbval(tmp_path_factory):
    """Run nbval once over all of these; name to (outcome, message) of the worst cell."""
    folder = tmp_path_factory.mktemp("nbval")
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, notebook in NOTEBOOKS.items():
        (folder / f"{name}.ipynb").write_bytes(pages.dump(notebook))
    command = [sys.executable, "-m", "pytest", "-p", "pipeline.nbval_plugin", "--nbval", "-q"]
    command += ["--color=no", "--junitxml=report.xml", "--continue-on-collection-errors", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "book")}
    subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True)
    return outcomes(ElementTree.parse(folder / "report.xml"))


def outcomes(report):
    found = {}
    for case in report.iter("testcase"):
        name = case.get("classname") or case.get("name")
        verdict = next(iter(case), None)
        outcome = "passed" if verdict is None else verdict.tag
        message = "" if verdict is None else f"{verdict.get('message')} {verdict.text}"
        if outcome != "passed" or name.split(".")[0] not in found:
            found[name.split(".")[0]] = (outcome, message)
    return found


def test_every_notebook_was_looked_at(nbval):
    assert nbval.keys() == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", ["as_stored", "within", "own_tolerance"])
def test_nbval_passes_what_agrees_within_the_tolerance(nbval, name):
    assert nbval[name] == ("passed", "")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("altered", "0.8912 became 0.8812"),
        ("altered_integer", "6 became 5"),
        ("unrun", "never executed"),
    ],
)
def test_nbval_fails_altered_and_never_executed_cells(nbval, name, says):
    outcome, message = nbval[name]
    assert outcome == "failure"
    assert says in message


def test_nbval_refuses_a_notebook_without_outputs(nbval):
    outcome, message = nbval["stripped"]
    assert outcome == "error"
    assert "holds no output at all" in message


def test_small_data_that_are_required_are_not_skipped():
    refuse = nbval_plugin.refuse
    refuse("a.ipynb", ["replogle2022", "papalexi2021"], {})
    refuse("a.ipynb", ["replogle2022"], {"SMS_REQUIRE_DATA": "1"})
    with pytest.raises(pytest.Collector.CollectError, match=r"a.ipynb: .* \['papalexi2021'\]"):
        refuse("a.ipynb", ["replogle2022", "papalexi2021"], {"SMS_REQUIRE_DATA": "1"})
    assert set(nbval_plugin.SMALL) <= sources.SOURCES.keys()


def test_nbval_skips_a_notebook_whose_data_are_missing_and_says_why(nbval):
    outcome, message = nbval["without_data"]
    assert outcome == "skipped"
    assert "data not available: ['no-such-screen']" in message


# ------------------------------------------------------------------ what a notebook declares


def test_the_parameter_cell_is_read_as_values(repository):
    notebook = pages.read_source(page(repository).source)
    assert pages.parameter_cell(notebook) == {"profile": "quick", "device": "cpu", "seed": 0}
    with pytest.raises(ValueError, match="expected one cell tagged 'parameters', found 0"):
        pages.parameter_cell(v4.new_notebook())


def test_a_parameter_may_be_any_literal():
    cell = v4.new_code_cell("a = 'x#y'  # why\nb = [1, None]", metadata={"tags": ["parameters"]})
    notebook = v4.new_notebook(cells=[cell])
    assert pages.parameter_cell(notebook) == {"a": "x#y", "b": [1, None]}


def test_missing_data_are_those_declared_and_not_available(repository):
    source = write(repository, header="smslib:\n  data: [here, gone]\n")
    notebook = pages.read_source(source)
    assert pages.missing_data(notebook, available=lambda name: name == "here") == ["gone"]
    assert pages.declared(notebook, "results") == []


# ------------------------------------------------------------------ executing


def test_a_notebook_runs_once_until_something_it_depends_on_changes(repository):
    report = []
    execute.execute_all(repository, "quick", report=report.append)
    first = pages.read_executed(page(repository).executed)
    assert first.cells[2].outputs[0].text == "quick 0.333333 on 1 thread\n"
    assert "injected-parameters" not in page(repository).executed.read_text()
    execute.execute_all(repository, "quick", report=report.append)
    write(repository, code="print('changed')")
    execute.execute_all(repository, "quick", report=report.append)
    assert [line.partition(": ")[2].partition(",")[0] for line in report] == [
        "quick",
        "up to date",
        "quick",
    ]
    record = json.loads(page(repository).record.read_text())
    assert (record["origin"], record["profile"], record["missing"]) == ("executed", "quick", [])


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("smslib/model.py", False),
        ("book/pipeline/pages.py", False),
        ("book/results/01_x.json", False),
        ("book/results/.ipynb_checkpoints/01_x.json", True),
        ("book/results/.01_x.json.tmp", True),
        ("notebooks/profiles/quick.yml", False),
        ("requirements.lock", False),
        ("notebooks/02_other.md", True),
        ("notebooks/profiles/full.yml", True),
        ("README.md", True),
    ],
)
def test_the_fingerprint_follows_exactly_what_a_notebook_depends_on(repository, changed, same):
    before = execute.fingerprint(page(repository))
    (repository / changed).parent.mkdir(exist_ok=True)
    (repository / changed).write_text("changed")
    assert (execute.fingerprint(page(repository)) == before) == same
    assert execute.fingerprint(page(repository), ["data"]) != before


def test_the_full_profile_is_injected_and_kept_apart(repository):
    execute.execute_all(repository, "full", report=lambda line: None)
    full = pages.read_executed(page(repository, "full").executed)
    assert full.cells[-1].outputs[0].text.startswith("full ")
    assert not page(repository).executed.exists()


def test_a_failing_cell_is_named_and_the_others_still_run(repository):
    write(repository, code="x = {}\nx['gene']")
    write(repository, name="02_other", code="print(1)")
    with pytest.raises(execute.NotebookFailed) as failure:
        execute.execute_all(repository, "quick", report=lambda line: None)
    assert str(failure.value) == (
        "01_page.md, code cell 2 ('x = {}'): KeyError: 'gene'; "
        "log in _build/executed/quick/01_page.log"
    )
    assert not page(repository).executed.exists()
    assert (repository / "_build/executed/quick/02_other.ipynb").exists()


def test_a_notebook_that_takes_too_long_is_stopped(repository):
    write(repository, code="import time\ntime.sleep(60)")
    with pytest.raises(execute.NotebookFailed, match=r"time is up after 0\.5 s; log in"):
        execute.execute_page(page(repository), timeout=0.5)


def test_without_its_data_a_page_shows_the_stored_outputs_and_says_so(repository):
    target = page(repository)
    with pytest.raises(execute.NotebookFailed, match="no stored outputs to show"):
        execute.execute_page(target, missing=["gone"])
    target.committed.write_bytes(pages.dump(measured()))
    execute.execute_page(target, missing=["gone"])
    stage.stage(repository, repository / "_build/src", "quick")
    staged = pages.read_executed(repository / "_build/src/notebooks/01_page.ipynb")
    assert any("Data not found here: gone" in cell.source for cell in staged.cells)
    assert any(cell.get("outputs") for cell in staged.cells)


def test_refreshing_stored_outputs_without_data_is_refused(repository):
    write(repository, header="smslib:\n  data: no-such-screen\n")
    with pytest.raises(execute.NotebookFailed, match=r"\['no-such-screen'\] are needed"):
        execute.execute_all(repository, "quick", report=lambda line: None, require_data=True)


def test_relative_data_directories_are_seen_from_the_root_and_others_kept(repository):
    relative = execute.kernel_environment(repository, {"SMS_DATA_DIR": "../data", "A": "b"})
    assert relative["SMS_DATA_DIR"] == str(repository / "../data")
    assert (relative["A"], relative["OMP_NUM_THREADS"]) == ("b", "1")
    absolute = execute.kernel_environment(repository, {"SMS_DATA_DIR": "/data"})
    assert absolute["SMS_DATA_DIR"] == "/data"
    assert "SMS_DATA_DIR" not in execute.kernel_environment(repository, {})


def test_notebooks_import_the_package_of_their_own_tree(repository):
    alone = execute.kernel_environment(repository, {})["PYTHONPATH"]
    beside = execute.kernel_environment(repository, {"PYTHONPATH": "book"})["PYTHONPATH"]
    assert (alone, beside) == (str(repository), os.pathsep.join([str(repository), "book"]))
    assert execute.kernel_environment(repository, {"PYTHONPATH": beside})["PYTHONPATH"] == beside
    write(repository, code="import smslib\nprint(smslib.__file__)")
    execute.execute_page(page(repository))
    (said,) = pages.read_executed(page(repository).executed).cells[2].outputs
    assert said.text.strip() == str(repository / "smslib" / "__init__.py")


def test_a_page_edited_after_it_was_run_is_left_alone(repository):
    said = []
    execute.execute_all(repository, "quick", report=said.append)
    source = write(repository, code="print('edited while the pages ran')")
    edited = source.read_bytes()
    said.clear()
    assert refresh.refresh(repository, report=said.append) == []
    assert source.read_bytes() == edited
    assert said == ["01_page: changed since it was run, left alone; run `make notebooks` again"]


def alive(process):
    """Whether a process runs; one that ended and was not asked for its status does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def eventually(true, seconds=60):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see processes in")
def test_what_is_told_to_end_ends_its_notebooks(repository):
    for name in ("01_page", "02_other", "03_waits"):
        code = f"import time\nopen('{name}.pid', 'w').write(str(os.getpid()))\ntime.sleep(300)"
        write(repository, name=name, code=f"import os\n{code}")
    shutil.copytree(ROOT / "book/pipeline", repository / "book/pipeline", dirs_exist_ok=True)
    command = [sys.executable, "-m", "pipeline", "execute"]
    pids = [repository / "notebooks" / f"{name}.pid" for name in ("01_page", "02_other")]
    with subprocess.Popen(command, cwd=repository / "book") as running:
        try:
            assert eventually(lambda: all(path.exists() and path.read_text() for path in pids))
            running.terminate()
            assert running.wait(60) == 128 + signal.SIGTERM
        finally:
            running.kill()  # nothing, where it has ended
    kernels = [int(path.read_text()) for path in pids]
    assert eventually(lambda: not any(map(alive, kernels)), seconds=10)
    assert not (repository / "notebooks" / "03_waits.pid").exists()


def test_refreshing_twice_changes_nothing_the_second_time(repository):
    execute.execute_all(repository, "quick", report=lambda line: None)
    assert "01_page.ipynb" in refresh.refresh(repository, report=pytest.fail)
    execute.execute_all(repository, "quick", report=lambda line: None, force=True)
    assert refresh.refresh(repository, report=pytest.fail) == []


# ------------------------------------------------------------------ staging and rendering


def test_staging_copies_sources_shows_the_chosen_outputs_and_then_nothing(repository):
    target = repository / "_build/src"
    execute.execute_all(repository, "quick", report=lambda line: None)
    refresh.refresh(repository, report=pytest.fail)
    assert {"notebooks/01_page.ipynb", "smslib/__init__.py", "build.json"} <= set(
        stage.stage(repository, target, "quick")
    )
    assert stage.stage(repository, target, "quick") == []
    assert "notebooks/01_page.ipynb" not in stage.stage(repository, target, None)
    info = json.loads((target / "build.json").read_text())
    assert info["pages"]["notebooks/01_page"]["origin"] == "stored"
    assert info["commit"] == "unknown"


def test_the_build_keeps_its_date_while_nothing_else_changes(repository):
    target = repository / "_build/src"
    execute.execute_all(repository, "quick", report=lambda line: None)
    stage.stage(repository, target, "quick")
    info = json.loads((target / "build.json").read_text())
    old = json.dumps({**info, "date": "2000-01-01"}, indent=1, sort_keys=True)
    (target / "build.json").write_text(old)
    assert stage.stage(repository, target, "quick") == []
    (target / "build.json").write_text(old.replace('"unknown"', '"abc"'))
    stage.stage(repository, target, "quick")
    assert json.loads((target / "build.json").read_text())["date"] == info["date"]


def commit_all(folder):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x", "--allow-empty"]):
        command = ["git", *identity, *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


with_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


@with_git
def test_a_tree_unpacked_in_another_repository_has_no_commit(tmp_path):
    commit_all(tmp_path)
    (tmp_path / "unpacked" / "smslib").mkdir(parents=True)
    (tmp_path / "unpacked" / "smslib" / "__init__.py").touch()
    assert stage.git_state(tmp_path / "unpacked") == {"commit": "unknown", "dirty": False}


@with_git
def test_git_state_tells_commit_and_changes(repository):
    commit_all(repository)
    clean = stage.git_state(repository)
    write(repository, code="print('changed')")
    assert not clean["dirty"]
    assert len(clean["commit"]) == 10
    assert stage.git_state(repository) == {"commit": clean["commit"], "dirty": True}


def test_a_render_log_is_reduced_to_its_problems():
    log = "\x1b[91mreading\na.md:3: WARNING: undefined label\x1b[0m\n"
    log += "Traceback (most recent call last)\n x"
    assert render.problems(log) == "a.md:3: WARNING: undefined label"
    assert render.problems("killed") == "killed"


CONFIG = """
title: Tiny
only_build_toc_files: true
execute: {execute_notebooks: "off"}
"""


def test_a_book_is_rendered_once_and_never_with_a_warning(tmp_path, monkeypatch):
    source = tmp_path / "src"
    contents = {"_config.yml": CONFIG, "_toc.yml": "format: jb-book\nroot: index\n"}
    pages_ = {name: text.encode() for name, text in contents.items()}
    files.mirror({**pages_, "index.md": b"# Title\n"}, source)
    index = render.render(source, tmp_path)
    assert "Title" in index.read_text()
    files.mirror({**pages_, "index.md": b"# Title\n\n{nosuch}`x`\n"}, source)
    for _ in range(2):  # the second time nothing changed, and it must fail all the same
        with pytest.raises(render.RenderFailed, match="index.md:3: WARNING: Unknown interpreted"):
            render.render(source, tmp_path)
    files.mirror({**pages_, "index.md": b"# Title\n"}, source)
    render.render(source, tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("rendered again"))
    assert render.render(source, tmp_path) == index


LINKED = {
    "_config.yml": CONFIG + 'sphinx: {local_extensions: {own: "ext"}}\n',
    "_toc.yml": "format: jb-book\nroot: index\nchapters: [{file: other}]\n",
    "ext/own.py": "def setup(app):\n    app.connect('source-read', read)\n\n\n"
    "def read(app, page, source):\n    source[0] = source[0].replace('WORD', 'first')\n",
    "index.md": "# Title\n\nSee {ref}`its title <there>` and {ref}`there`, WORD.\n",
    "other.md": "(there)=\n# Old name\n",
}


def test_rendered_again_a_page_follows_other_pages_and_the_extensions(tmp_path):
    source = tmp_path / "src"

    def rendered(**changed):
        texts = {name: changed.get(Path(name).stem, text) for name, text in LINKED.items()}
        files.mirror({name: text.encode() for name, text in texts.items()}, source)
        return render.render(source, tmp_path).read_text()

    assert "Old name" in (first := rendered())
    assert "first" in first
    again = rendered(other="(there)=\n# New name\n")
    assert "Old name" not in again
    assert "second" in rendered(own=LINKED["ext/own.py"].replace("first", "second"))
    for _ in range(2):
        with pytest.raises(render.RenderFailed, match="undefined label: 'there'"):
            rendered(other="# Old name\n")


def test_prose_does_not_have_every_page_read_again(tmp_path):
    def shared(text):
        (tmp_path / "page.md").write_text(text)
        return render.shared_fingerprint(tmp_path)

    plain = shared("# A\n\nprose\n")
    assert shared("# A\n\nother prose\n") == plain
    others = ["# B", "(a)=\n# A", "# A\n```{math}\n:label: a", "# A\n:::{glossary}\na"]
    assert len({plain, *map(shared, others)}) == 5
    assert shared("# A\n:::{glossary}\na") != shared("# A\n:::{glossary}\nb")


def test_a_rendering_that_was_killed_near_its_end_is_made_anew(tmp_path):
    source, html = tmp_path / "src", tmp_path / "_build" / "html"
    contents = {"_config.yml": CONFIG, "_toc.yml": "format: jb-book\nroot: index\n"}
    contents |= {"index.md": "# Title\n"}
    files.mirror({name: text.encode() for name, text in contents.items()}, source)
    render.render(source, tmp_path)
    last = [html / "objects.inv", html / "searchindex.js"]
    for path in (tmp_path / "_build" / "rendered", *last):
        path.unlink()
    render.render(source, tmp_path)
    assert all(path.is_file() for path in last)


def test_the_command_line_reports_a_failed_page_and_its_status(monkeypatch, capsys):
    from pipeline import __main__ as command

    def fail(*_, **__):
        raise execute.NotebookFailed("01_page.md, code cell 2: KeyError")

    monkeypatch.setattr(command, "execute_all", fail)
    assert command.main(["execute", "--profile", "quick"]) == 1
    assert capsys.readouterr().err == "01_page.md, code cell 2: KeyError\n"
    monkeypatch.setattr(command, "execute_all", lambda *_, **__: [])
    assert command.main(["execute"]) == 0
