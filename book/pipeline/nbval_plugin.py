"""nbval with numbers compared within tolerances, and no way to pass on outputs that are not there.

Loaded by the root ``conftest.py``; active with ``pytest --nbval``. Three things differ from
nbval alone. Outputs are compared by :mod:`pipeline.compare`, with the tolerance that a cell's
``nbval: {rtol: ..., atol: ...}`` metadata asks for. A code cell that was never executed, or a
notebook with no output at all, fails instead of passing for want of anything to compare. A
notebook that declares data which are not there is skipped and says so; where ``SMS_REQUIRE_DATA``
is set and the data are small, it is an error.
"""

import os
import tempfile
import uuid
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbval.kernel
import pytest
from jupyter_client.manager import KernelManager
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile

from pipeline import pages
from pipeline.compare import Tolerance, output_differences
from pipeline.execute import kernel_environment

# A few megabytes each, so that a machine with a network has no reason to be without them.
SMALL = ("papalexi2021", "norman2019-mini", "replogle2022-gene-lists")


def manager(**options: object) -> KernelManager:
    """Return a kernel that talks over named sockets.

    Ports are chosen before they are taken: of kernels that start side by side one may wait in
    vain for the other's.
    """
    name = Path(tempfile.gettempdir(), f"kernel-{uuid.uuid4().hex}")
    return KernelManager(transport="ipc", ip=str(name), **options)


if os.name == "posix":  # elsewhere there are none
    nbval.kernel.KernelManager = manager


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Generator[None, Any, list]:
    """Put our collector in the place of nbval's."""
    collected = yield
    return [
        NotebookFile.from_parent(parent, path=file_path) if type(item) is IPyNbFile else item
        for item in collected
    ]


def refuse(name: str, absent: list[str], environment: Mapping[str, str]) -> None:
    """Fail a notebook whose small data are missing where they are said to be required.

    Raises
    ------
    CollectError
        With ``SMS_REQUIRE_DATA`` set: a green run would have compared nothing.
    """
    small = [source for source in absent if source in SMALL]
    if small and environment.get("SMS_REQUIRE_DATA"):
        message = f"{name}: SMS_REQUIRE_DATA is set, and {small} neither on disk nor downloadable"
        raise pytest.Collector.CollectError(f"{message}; see SMS_DATA_DIR")


def tolerance(cell_metadata: dict[str, Any]) -> Tolerance:
    """Read ``nbval: {rtol, atol}`` of a cell's metadata."""
    return Tolerance(**cell_metadata.get("nbval", {}))


class NotebookFile(IPyNbFile):
    """A notebook whose cells are compared within tolerances."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield one test per code cell."""
        cells = list(super().collect())
        absent = pages.missing_data(self.nb)
        refuse(self.path.name, absent, os.environ)
        if not any(item.cell.outputs for item in cells):
            message = f"{self.path.name} holds no output at all: run `make notebooks`"
            raise self.CollectError(message)
        for item in cells:
            ours = NotebookCell.from_parent(
                self, name=item.name, cell_num=item.cell_num, cell=item.cell, options=item.options
            )
            if absent:
                ours.add_marker(pytest.mark.skip(reason=f"data not available: {absent}"))
            yield ours

    def setup(self) -> None:
        """Start the kernel in the notebook's folder, in the pipeline's environment.

        Nothing here measures coverage: that is the unit tests' business.
        """
        os.environ.update(kernel_environment(self.config.rootpath, dict(os.environ)))
        self.kernel = RunningKernel(CURRENT_ENV_KERNEL_NAME, cwd=str(self.path.parent))
        self.setup_sanitize_files()

    def teardown(self) -> None:
        """Stop the kernel."""
        if self.kernel is not None and self.kernel.is_alive():
            self.kernel.stop()


class NotebookCell(IPyNbCell):
    """A code cell that fails if it was never run or if its outputs moved too far."""

    def runtest(self) -> None:
        """Run the cell and compare, after checking that there is something to compare with."""
        written = self.cell.source.strip() and not self.options["skip"]
        if written and self.cell.execution_count is None:
            self.raise_cell_error("stored cell was never executed: run `make notebooks`")
        super().runtest()

    def compare_outputs(self, test: list, ref: list, skip_compare: object = None) -> bool:
        """Say whether the outputs agree with the stored ones; keep the differences to report."""
        self.comparison_traceback = output_differences(ref, test, tolerance(self.cell.metadata))
        return not self.comparison_traceback
