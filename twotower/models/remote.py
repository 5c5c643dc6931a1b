"""Models that run on a server; only configuration and tokenizer are loaded locally.

A batch is one session, and a session is one job. Its traces are sent as source, with the parts of
this package that they use; only the results come back. Tested against our own server in another
process, with the protocol of nnsight 0.8.1, the same Python version, and without this package or
xarray (tests/models/test_remote.py). Untested against the public NDIF service. Classes without
source are sent as bytecode, so client and server need the same minor version of Python.
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
    """Return a model on NDIF or on your own server.

    Parameters
    ----------
    name
        Hub id on the server.
    tokenizer
        Its tokenizer.
    server
        True for NDIF, or an address, "http://..."; call `prepare` with it first.
    revision
        Branch, tag or commit on the hub.
    options
        Hub options: `token`, `cache_dir`, `trust_remote_code`.

    Raises
    ------
    InputError
        If the address is invalid.
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
    """Turn connection errors of a remote model into a one-sentence error.

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
    """Send this package with every request, because servers do not have it.

    Raises
    ------
    InputError
        If `server` is not True, "local" or an address.
    """
    import nnsight

    addressed = isinstance(server, str) and server.startswith(("http://", "https://"))
    if server is not True and server != "local" and not addressed:
        raise InputError(f"remote={server!r} must be True, or the address of a server: http://...")
    nnsight.register("twotower")
