"""The report: one HTML page of one run or two, which opens from disk in any browser."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import is_list, whole, writable_file
from ..errors import InputError
from .packing import compressed
from .report_data import (
    columns_of,
    comparison,
    differences,
    prompt_data,
    run_data,
    table_of,
)
from .views import one_run

if TYPE_CHECKING:
    import xarray as xr

MOST_BYTES = 6_000_000
"""Default page size. Larger runs are cut to fit: first prompts, then heads; the page says so."""

LEAST_BYTES = 2_500_000
"""Size of a page with one small prompt: mostly the plotting library."""


def write_report(
    run: xr.DataTree,
    path: str | Path,
    other: xr.DataTree | None = None,
    *,
    names: Sequence[str] = ("A", "B"),
    prompts: Sequence[int] | None = None,
    most_bytes: int = MOST_BYTES,
) -> Path:
    """Write a run, or a comparison of two runs, as one page that needs no network.

    Parameters
    ----------
    run
        Result of `analyze` or `open`; of a run with several parts, one part.
    path
        The file, usually ending in ".html". An existing file is replaced.
    other
        A second run of a model with the same heads.
    names
        Names of the runs.
    prompts
        Numbers of the prompts to include; by default all. Large runs are cut to fit: first
        prompts, then heads. The page says what was left out.
    most_bytes
        Maximum size of the page.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        If there is nothing to show, the runs do not have the same heads, a prompt is missing,
        or the size is too small.
    """
    _check_installed()
    whole("most_bytes", most_bytes, LEAST_BYTES)
    runs = [one_run(run)] if other is None else [one_run(run), one_run(other)]
    if not isinstance(path, (str, Path)):
        raise InputError(f"path={path!r} must be a path")
    if not is_list(names, sized=True):
        raise InputError(f"names={names!r} must be {len(runs)} texts")
    if len(names) < len(runs) or not all(isinstance(name, str) for name in names):
        raise InputError(f"names={names!r} must be {len(runs)} texts")
    if prompts is not None and not isinstance(prompts, (list, tuple, range)):
        raise InputError(f"prompts={prompts!r} must be a list of numbers")
    for i, number in enumerate(prompts or ()):
        if number in list(prompts or ())[:i]:
            raise InputError(f"prompt {number} is named twice")
    target = writable_file(path)
    tables = [table_of(x) for x in runs]
    found = [run_data(*each) for each in zip(runs, names, tables, strict=False)]
    content: dict[str, Any] = {"runs": found, "columns": columns_of(found)}
    content |= {"comparison": [], "differences": ""}
    if len(runs) == 2:
        if tables[0] is None or tables[1] is None:
            raise InputError("the runs cannot be compared: one has no numbers of heads")
        content["comparison"] = comparison(tables[0], tables[1])
        content["differences"] = differences(runs[0], runs[1])
    library = _library()
    room = most_bytes - len(_page(content, [], library)) - 20_000
    blobs = []
    share = room // len(runs)
    for data, one, table in zip(found, runs, tables, strict=True):
        data["prompts"], packed, data["held"] = prompt_data(one, table, prompts, share)
        data["notes"] += _left_out(data)
        blobs.append(packed)
    page = _page(content, blobs, library)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_text(page, encoding="utf-8", errors="replace")
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise InputError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _left_out(data: dict[str, Any]) -> list[str]:
    """Return notes about what was left out to keep the page small."""
    held, of, heads = len(data["prompts"]), data["held"]["of"], data["held"]["heads"]
    notes = []
    if held < of:
        notes.append(f"To keep the page small, {held} of {of} prompts can be looked at.")
    if heads is not None:
        total = len(data["layers"]) * len(data["heads"])
        notes.append(
            f"To keep the page small, prompts can be looked at for {len(heads)} of {total} heads, "
            "the strongest."
        )
    return notes


def _page(content: dict[str, Any], blobs: Sequence[Sequence[str]], library: str) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("twotower.figures", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("twotower.figures") / "templates"
    models = [dict(run["about"]).get("model", run["name"]) for run in content["runs"]]
    return environment.get_template("report.html.j2").render(
        title=" and ".join(dict.fromkeys(models)),
        runs=content["runs"],
        hint="18.6, 18., "
        + ("induction" if any(run["kinds"] for run in content["runs"]) else "in-context"),
        content=_safe_json(content),
        blobs=blobs,
        library=library,
        css=(folder / "report.css").read_text(encoding="utf-8"),
        js=(folder / "report.js").read_text(encoding="utf-8"),
        # Only scripts with this random number run, so a prompt's text never runs as a script.
        nonce=secrets.token_hex(16),
    )


def _safe_json(content: Any) -> str:
    """Return JSON that cannot close the script element around it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _check_installed() -> None:
    """Reject a report where the libraries of its extra are missing."""
    missing = [name for name in ("jinja2", "plotly") if find_spec(name) is None]
    if missing:
        raise InputError(f"a report needs {' and '.join(missing)}: pip install 'twotower[report]'")


@cache
def _library() -> str:
    """Return plotly for the page; half of a small report's time is its compression."""
    from plotly.offline import get_plotlyjs

    return compressed(get_plotlyjs().encode())
