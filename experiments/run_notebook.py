"""Run explore.ipynb and keep its outputs, without what changes from run to run.

python experiments/run_notebook.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).with_name("explore.ipynb")


def executed(path: Path = NOTEBOOK) -> Any:
    """The notebook with new outputs.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
        if cell.cell_type == "code":
            # What libraries say while they load is no result.
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    import nbformat

    nbformat.write(executed(), NOTEBOOK)
    print(f"wrote {NOTEBOOK}")
