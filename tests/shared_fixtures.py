"""Fixtures shared by all tests.

A plugin beside conftest.py, which imports nothing heavy: of xdist's processes the first one runs no
test.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TWO, byte_level, distinct, hf_model, random_llama, tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import twotower as tt
from twotower.models.fetch import fetch_demo_model


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what was imported, which stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Beside another worker of the tests each has one core.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _figures_closed() -> Iterator[None]:
    """No figure that a test left open is seen by the next one."""
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close("all")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Computing on one thread, as is quicker for tiny models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=distinct(), scope="session")
def any_model(request: pytest.FixtureRequest) -> tt.Model:
    """A random model of each architecture in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def llama() -> tt.Model:
    """A random grouped-query Llama."""
    return tiny("llama-grouped")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random grouped-query Llama in a folder, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    hf_model("llama-grouped").save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded() -> dict[tuple[Any, ...], tt.Model]:
    """The checkpoint's models by the options that they were loaded with."""
    return {}


@pytest.fixture
def loaded_once(checkpoint: Path, loaded: dict[tuple[Any, ...], tt.Model]) -> Iterator[None]:
    """The checkpoint is loaded, and checked, once for all runs and commands of such tests."""
    from twotower.runs.load_settings import LoadSettings

    load = LoadSettings.load

    def once(settings: LoadSettings, model: Any, **more: Any) -> tt.Model:
        usual = settings.remote is None and (settings.threads is None or settings.threads > 0)
        if str(model) != str(checkpoint) or more or not usual:
            return load(settings, model, **more)
        key = tuple(settings.options().items())
        if key not in loaded:
            loaded[key] = load(settings, model)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)  # as loading does
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadSettings, "load", once)
        yield


@pytest.fixture(scope="session")
def prompts(llama: tt.Model) -> tt.Prompts:
    """Six prompts of unequal length, two classes, three shots."""
    return tt.build_prompts(llama, TWO, shots=3, n=6, seed=1)


@pytest.fixture(scope="session")
def demo_model() -> tt.Model:
    """The demo model; fetched the first time."""
    return tt.load("smollm2-135m")


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    """The demo model's tokenizer."""
    return AutoTokenizer.from_pretrained(fetch_demo_model())


@pytest.fixture(scope="session")
def random_model(demo_tokenizer: PreTrainedTokenizerBase) -> tt.Model:
    """The demo model's tokenizer and 224 small heads; no better than chance at any task."""
    return random_llama(demo_tokenizer, layers=7, heads=32)
