"""Carry out the suite: measure its units with an engine, then judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..errors import FindingError, InputError, TwoTowerError
from ..runs.claim import Claim
from ..runs.drive import drive
from ..runs.engine import Engine, Outcome
from ..runs.engine_settings import EngineSettings
from ..runs.engines import start_engine
from .run import conclude
from .units import SeedLedger, SeedWorker, Suite


def run_suite(
    suite: Suite, settings: EngineSettings, *, log: Callable[[str], None] = print
) -> None:
    """Measure what is missing, judge, draw, and write everything.

    Parameters
    ----------
    suite
        The experiments and their model.
    settings
        Settings of the engine.
    log
        Called with lines about the progress.

    Raises
    ------
    FindingError, InputError
        If experiments failed; the results of the others are written.
    StoreError
        If the folder cannot be written, or another process measures into it.
    """
    settings.check()
    missing = suite.missing()
    for unit in suite.units:
        if unit not in missing:
            path = suite.trials[unit.experiment].path(unit.seed)
            log(f"{unit}: measured before ({path})")
    failed: dict[str, Exception] = {}
    if missing:
        failed = _measure(suite, settings, log)
    for name, trial in suite.trials.items():
        if name not in failed:
            conclude(trial, log)
        elif len(suite.trials) > 1:
            log(f"{trial.experiment.name}: {failed[name]}")
    if failed:
        first = next(iter(failed.values()))
        if len(suite.trials) == 1 or not isinstance(first, TwoTowerError):
            raise first
        kind = type(first) if isinstance(first, (FindingError, InputError)) else FindingError
        raise kind(
            f"{len(failed)} of {len(suite.trials)} experiments failed; the first: {first}"
        ) from first


def _measure(
    suite: Suite, settings: EngineSettings, log: Callable[[str], None]
) -> dict[str, Exception]:
    """Measure the missing units; return errors by experiment."""
    if settings.engine != "local":
        suite = replace(suite, show=False)  # progress bars of several processes would mix
    ledger = SeedLedger(suite.out)
    reports: dict[str, dict[str, object]] = {}

    def seen(engine: Engine, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.error is None:
            log(f"{outcome.unit}: {outcome.report.seconds:.0f} s")
            reports[str(outcome.unit)] = vars(outcome.report)
            ledger.write(reports=reports)

    engine = start_engine(settings, partial(SeedWorker, suite), suite.how.threads)
    try:
        engine.call("describe")  # fail on a wrong model before anything is written
        with Claim(ledger, engine):
            ledger.plan(suite)
            driven = drive(engine, suite.missing(), seen=seen, log=log)
            ledger.write(errors={str(unit): str(error) for unit, error in driven.failed.items()})
    finally:
        engine.close()
    if len(suite.missing()) == len(suite.units):
        ledger.forget()
    if driven.interrupted:
        raise KeyboardInterrupt
    return {unit.experiment: error for unit, error in driven.failed.items()}
