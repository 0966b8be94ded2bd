"""Make an executed notebook a function of its source and results, not of when and how it ran.

Two runs of the same cells give the same file; what papermill, the kernel and the clock leave
behind is removed, figures are reduced to a palette.
"""

import base64
import copy
import io
import re

from nbformat import NotebookNode

COLOURS = 128
NOTEBOOK_METADATA = ("jupytext", "kernelspec", "language_info", "mystnb", "smslib")
CELL_METADATA = ("mystnb", "nbval", "tags")
INJECTED = "injected-parameters"
_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Return a copy of ``notebook`` freed of everything that changes from run to run."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = _notebook_metadata(notebook.metadata)
    notebook.cells = [cell for cell in notebook.cells if INJECTED not in _tags(cell)]
    count = 0
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"c{index:03d}"
        cell.metadata = _cell_metadata(cell.metadata)
        if cell.cell_type == "code" and cell.execution_count is not None:
            count += 1
            _normalise_code(cell, count)
    return notebook


def quantise(png: bytes, *, colours: int = COLOURS) -> bytes:
    """Return ``png`` on white with at most ``colours`` colours, or itself if that is smaller."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    reduced = io.BytesIO()
    # By median cut alone rare colours, such as those of a colour bar, turn into others.
    palette = page.convert("RGB").quantize(colours, kmeans=1, dither=Image.Dither.NONE)
    palette.save(reduced, format="PNG", optimize=True, dpi=image.info.get("dpi", (96, 96)))
    return min(png, reduced.getvalue(), key=len)


def bridge_alt_text(notebook: NotebookNode) -> NotebookNode:
    """Return a copy in which the renderer finds the alternative texts that figures carry.

    Figures are displayed with ``metadata={"image/png": {"alt": ...}}``; the renderer reads
    ``mystnb.image.alt`` of the cell and ignores the former.
    """
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        alts = [alt for output in cell.get("outputs", []) if (alt := _alt(output))]
        if alts:
            image = cell.metadata.setdefault("mystnb", {}).setdefault("image", {})
            image.setdefault("alt", alts[0])
    return notebook


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _notebook_metadata(metadata: NotebookNode) -> NotebookNode:
    kept = NotebookNode({key: metadata[key] for key in NOTEBOOK_METADATA if key in metadata})
    if "language_info" in kept:
        kept.language_info = NotebookNode(name=kept.language_info.get("name", "python"))
    if "jupytext" in kept:
        # The text says how it is written; in the notebook jupytext would drop it at the next sync.
        kept.jupytext.pop("text_representation", None)
    return kept


def _cell_metadata(metadata: NotebookNode) -> NotebookNode:
    return NotebookNode({key: metadata[key] for key in CELL_METADATA if metadata.get(key)})


def _normalise_code(cell: NotebookNode, count: int) -> None:
    cell.execution_count = count
    cell.outputs = _merge_streams(cell.outputs)
    for output in cell.outputs:
        if output.output_type == "execute_result":
            output.execution_count = count
        if output.output_type == "error":
            output.traceback = [_TERMINAL_COLOUR.sub("", line) for line in output.traceback]
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = _quantise_text(output.data["image/png"])


def _quantise_text(encoded: str) -> str:
    return base64.b64encode(quantise(base64.b64decode(encoded))).decode()


def _merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        both = last is not None and last.output_type == output.output_type == "stream"
        if both and last.name == output.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def _alt(output: NotebookNode) -> str | None:
    return output.get("metadata", {}).get("image/png", {}).get("alt")
