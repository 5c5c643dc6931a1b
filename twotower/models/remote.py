"""Models that run on a server: only configuration and tokenizer are loaded here.

A batch is one session, and a session one job: its traces are sent as source, with the parts of
this package that they use, and only the results come back. What has been run against what: a
server of our own in another process, which speaks the protocol of nnsight 0.8.1, on the same
version of Python and without this package or xarray (tests/models/test_remote.py); not the
public NDIF service. Classes are sent as bytecode where they have no source of their own, so
client and server need the same minor version of Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from requests import RequestException
from websocket import WebSocketException

from ..errors import InputError, ModelError, in_one_line
from .model import Model
from .registry import find_architecture


def remote_model(
    name: str,
    tokenizer: Any,
    server: bool | str,
    revision: str | None,
    options: Mapping[str, Any],
) -> Model:
    """A model on NDIF, or on a server of one's own.

    Parameters
    ----------
    name
        Hub id, as the server knows it.
    tokenizer
        Its tokenizer.
    server
        True for NDIF, or an address, "http://..."; `prepare` was called with it.
    revision
        Branch, tag or commit on the hub.
    options
        How to ask the hub: `token`, `cache_dir`, `trust_remote_code`.

    Raises
    ------
    InputError
        If the address is none.
    """
    import nnsight

    hub = {} if revision is None else {"revision": revision}
    traced = nnsight.TransformersModel(
        name, task="text-generation", tokenizer=tokenizer, **hub, **options
    )
    module = traced._module
    architecture = find_architecture(module.config, module)
    return Model(traced, tokenizer, architecture, name, revision, remote=server)


@contextmanager
def reached(server: bool | str) -> Iterator[None]:
    """Say in one sentence that a server is not there, where one is asked.

    Raises
    ------
    ModelError
        If the connection fails.
    """
    try:
        yield
    except (ConnectionError, RequestException, WebSocketException) as error:
        if not server:
            raise
        name = "NDIF" if server is True else server
        raise ModelError(f"{name} cannot be reached: {in_one_line(error, 200)}") from error


def prepare(server: bool | str) -> None:
    """Have the package sent along with every request, as servers do not have it.

    Raises
    ------
    InputError
        If the server is none.
    """
    import nnsight

    addressed = isinstance(server, str) and server.startswith(("http://", "https://"))
    if server is not True and server != "local" and not addressed:
        raise InputError(f"remote={server!r} must be True, or the address of a server: http://...")
    nnsight.register("twotower")
