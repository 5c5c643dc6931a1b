"""Carry out a configuration: make its store, measure its units, compute the scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import StoreError, in_one_line
from .claim import Claim
from .configuration import Configuration
from .drive import Driven, drive
from .engine import Engine
from .engines import start_engine
from .worker import Worker

if TYPE_CHECKING:
    import xarray as xr

    from ..results.units import Unit, UnitStore


@dataclass
class Finished:
    """Result of a run.

    Attributes
    ----------
    run
        The opened run.
    before
        Number of units done before this call.
    driven
        Result of the other units.
    """

    run: xr.DataTree
    before: int
    driven: Driven


def carry_out(
    config: Configuration,
    *,
    log: Callable[[str], None] = print,
    progress: bool = False,
) -> Finished:
    """Measure the missing units of a run.

    Parameters
    ----------
    config
        The run. Called again with the same one, it resumes.
    log
        Called with lines about the run.
    progress
        Whether to show progress bars.

    Returns
    -------
    Finished

    Raises
    ------
    StoreError
        If the store belongs to another configuration, is driven by another process, or
        cannot be written.
    InputError
        If a setting is wrong.
    """
    from ..results import open as open_run
    from ..results.place import Place
    from ..results.store import check_place
    from ..results.units import DONE, UnitStore
    from .progress import Bars

    config.check()
    store = UnitStore(Place(config.store), config.patience)
    begun = store.place.holds() and not config.overwrite
    if begun:
        check_same(store, config)
    else:
        check_place(config.store, config.overwrite)
    for part in config.parts.values():
        part.load_task()  # reject a wrong name before a model is loaded
    engine = start_engine(config, partial(Worker, config), config.threads)
    try:
        if not begun:
            about = {"configuration": json.dumps(config.describe(), sort_keys=True)}
            for line in engine.call("create", {**about, "configuration_hash": config.hash}):
                log(line)
        units = store.units()
        missing = [unit for unit, state in zip(units, store.states(), strict=True) if state != DONE]
        if begun:
            store.complete()
            for name, before, now in changed_versions(store, next(iter(config.parts))):
                log(f"started with {name} {before}, now {now}: numbers may differ a little")
            log(f"{store.place}: {len(units) - len(missing)} of {len(units)} units are done")
        with Claim(store, engine), Bars(units, missing, progress) as bars:
            store.clean()
            driven = _measure(engine, store, missing, config, bars.seen, log)
            if not driven.interrupted:  # a worker may have been killed on the way
                store.clean()
    finally:
        engine.close()
    if driven.interrupted:
        raise KeyboardInterrupt
    finish(store, list(config.parts))
    run = open_run(config.store)
    for line in not_finite(run, list(config.parts)):
        log(line)
    return Finished(run, len(units) - len(missing), driven)


def not_finite(run: xr.DataTree, parts: Sequence[str]) -> list[str]:
    """Return a line for each part with prompts or values that are not finite."""
    from ..results.missing import finite_prompts
    from ..walk.not_finite import Notice

    lines = []
    for part in parts:
        here, notice = run[part] if part else run, Notice()
        groups = {name: node.to_dataset(inherit=False) for name, node in here.children.items()}
        for name, group in groups.items():
            if name != "scores":  # scores would count the same values again
                notice.values[name] = int(group.attrs.get("not_finite_values", 0))
            if "finite" in group.coords:
                finite = finite_prompts(group)
                bad = {i for i, good in enumerate(finite) if not good}
                notice.prompts["prompts"] = (bad, len(finite))
        if text := notice.text():
            lines.append(f"{part}: {text}" if part else text)
    return lines


def _measure(
    engine: Engine,
    store: UnitStore,
    missing: list[Unit],
    config: Configuration,
    seen: Callable[..., None],
    log: Callable[[str], None],
) -> Driven:
    """Carry out units, and record the failed ones."""
    from ..results.units import FAILED

    models = {name: part.model[0] for name, part in config.parts.items()}
    driven = drive(engine, missing, alike=lambda unit: models[unit.part], seen=seen, log=log)
    for unit, error in driven.failed.items():
        store.mark(unit, FAILED, error=in_one_line(error, 1000))
    return driven


def check_same(store: UnitStore, config: Configuration) -> None:
    """Check that the store belongs to this configuration.

    Raises
    ------
    StoreError
        With the settings that differ, or if the store holds no run measured in units.
    """
    from ..results.schema import SCHEMA_VERSION

    try:
        about = store.attributes()
    except StoreError as error:
        raise StoreError(f"{error}; it exists already: use another --output") from error
    if "twotower_schema" not in about:
        raise StoreError(f"{store.place} exists already and is not a twotower run")
    if about["twotower_schema"] != SCHEMA_VERSION:
        raise StoreError(
            f"{store.place} has schema {about['twotower_schema']}; this version writes "
            f"{SCHEMA_VERSION}: use --overwrite, or another --output"
        )
    if "configuration" not in about:
        raise StoreError(f"{store.place} exists already; use --overwrite, or another --output")
    before, now = json.loads(about["configuration"]), config.describe()
    changed = [
        f"{name} was {_shown(before, name)}, is now {_shown(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise StoreError(
            f"{store.place} was started with other settings: {'; '.join(changed)}. Use "
            "--overwrite, or another --output"
        )
    store.states()
    store.place.require_writable()


def changed_versions(store: UnitStore, part: str) -> list[tuple[str, str, str]]:
    """Return packages whose version changed: name, version at the start, version now."""
    from ..results.provenance import versions

    before, now = json.loads(store.attributes(part)["versions"]), versions()
    return [(name, before[name], now[name]) for name in before if before[name] != now.get(name)]


def _shown(settings: dict[str, Any], name: str) -> str:
    value = settings.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return json.dumps(value, ensure_ascii=False)


def finish(store: UnitStore, parts: Sequence[str]) -> None:
    """Compute the scores of every part from its measured units, and write them.

    Parts whose scores already cover these units are skipped.
    """
    from ..measures.scores import two_tower_scores
    from ..results import open as open_run
    from ..results.units import DONE

    ledger, scored = store.ledger("part", "start", "stop", "state"), store.scored()
    sizes = (ledger["stop"] - ledger["start"]).where(ledger["state"] == DONE, 0)
    measured = {part: int(sizes[(ledger["part"] == part).values].sum()) for part in parts}
    if all(scored.get(part) == n for part, n in measured.items()):
        return
    run: Any = open_run(store.place)
    for part, n in measured.items():
        here = run[part] if part else run
        if scored.get(part) != n and "scores" in here.children:
            store.write_scores(part, two_tower_scores(here), n)
