"""The script for Slurm, with commands of Slurm that stand in for it on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.cli.status import status_of

pytest.importorskip("ray")
SCRIPT = Path(__file__).parents[2] / "experiments" / "slurm.sh"
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do
    case "$1" in --overlap) shift ;; *) shift 2 ;; esac
done
if [[ "$1" == hostname ]]; then echo 127.0.0.1; else exec "$@"; fi
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_run_over_an_allocation(checkpoint: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho node1\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": str(os.getpid()), "PATH": path}
    out = tmp_path / "run.zarr"
    given = ["--model", checkpoint, "--output", out, "--n", 8, "--unit-size", 2, "--shots", 2]
    process = subprocess.Popen(
        [str(x) for x in (SCRIPT, *given, "--threads", 1, "--workers", 2)],
        env={**os.environ, **job},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    finally:
        subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
    status = status_of(out)
    assert (status.done, len(status.workers)) == (4, 2)
