"""Models over several devices; what is tested stands in `sharded.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_over_several_devices(pytestconfig: pytest.Config) -> None:
    file = Path(__file__).with_name("sharded.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    command += ["-m", pytestconfig.option.markexpr]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
