"""Models over several devices; what is tested stands in `sharded.py`.

The same process checks the shapes that functions name, which needs one of its own, too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checked import OPTION


def test_over_several_devices(pytestconfig: pytest.Config) -> None:
    file = Path(__file__).with_name("sharded.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    command.append(OPTION)
    command += ["-m", pytestconfig.option.markexpr]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
