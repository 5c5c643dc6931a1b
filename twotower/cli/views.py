"""Commands that show a run: its heads, a prompt, and a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..runs.load_settings import Whole, Wholes
from .sizing import console_of

if TYPE_CHECKING:
    import xarray as xr


def heads(
    run: str, *, k: Whole = 12, by: str | None = None, part: str | None = None, json: bool = False
) -> None:
    """Show the strongest heads of a run, with all their scores.

    Parameters
    ----------
    run
        The store of a run: a path or a URL.
    k
        Number of heads.
    by
        Variable to rank by; by default margin_drop, or the first one that the run has.
    part
        Part of a run over several models, tasks or seeds.
    json
        Print JSON.
    """
    from json import dumps

    from ..checks import whole
    from ..figures.terminal import rows_of, show_heads

    whole("k", k, 1)
    rows = rows_of(_opened(run, part), by, k)
    if json:
        print(dumps(rows, indent=1))
    else:
        show_heads(rows, console_of())


def show(
    run: str,
    *,
    head: str,
    prompt: Whole = 0,
    part: str | None = None,
    json: bool = False,
) -> None:
    """Show a prompt as a head sees it: attention, scores, and the label that its OV writes.

    Parameters
    ----------
    run
        The store of a run: a path or a URL.
    head
        Layer and head, such as 21.3.
    prompt
        Number of the prompt.
    part
        Part of a run over several models, tasks or seeds.
    json
        Print JSON, token by token.
    """
    from json import dumps

    from ..figures.terminal import prompt_rows, show_prompt
    from ..figures.views import prompt_view
    from ..head import parse_head

    place = parse_head(head)
    opened = _opened(run, part)
    if json:
        print(dumps(prompt_rows(prompt_view(opened, prompt), place), indent=1))
    else:
        show_prompt(opened, place, prompt, console_of())


def report(
    run: str,
    other: str | None = None,
    *,
    output: Annotated[Path, Parameter(alias="-o")] = Path("report.html"),
    part: str | None = None,
    other_part: str | None = None,
    prompts: Annotated[list[int] | None, Wholes] = None,
    most_bytes: Whole | None = None,
) -> None:
    """Write a run, or a comparison of two runs, as one HTML page.

    Parameters
    ----------
    run
        The store of a run: a path or a URL.
    other
        A second run, of a model with the same heads. Default with --other-part: the same run.
    output
        The HTML file.
    part
        Part of a run over several models, tasks or seeds.
    other_part
        Part of the second run.
    prompts
        Numbers of the prompts to include; by default as many as fit.
    most_bytes
        Maximum size of the page; by default 6 MB.
    """
    from ..figures.report import MOST_BYTES, write_report

    stores, chosen = [run], [part]
    if other is not None or other_part is not None:
        stores.append(run if other is None else other)
        chosen.append(other_part)
    opened = [_opened(x, y) for x, y in zip(stores, chosen, strict=True)]
    names = [y or Path(x).stem for x, y in zip(stores, chosen, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)]
    written = write_report(
        opened[0],
        output,
        opened[1] if len(opened) > 1 else None,
        names=names,
        prompts=prompts,
        most_bytes=MOST_BYTES if most_bytes is None else most_bytes,
    )
    size = written.stat().st_size / 1e6
    console_of().print(f"Saved {written} ({size:.1f} MB); open it in a browser.", soft_wrap=True)


def _opened(place: str, part: str | None) -> xr.DataTree:
    from ..figures.views import one_run
    from ..results import open

    return one_run(open(place), part)
