"""Where a store is: a path, or the URL of an object store such as s3://bucket/run.zarr."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable


class Place:
    """A place for one store.

    Parameters
    ----------
    where
        A path, or a URL that obstore knows: s3://, gs://, az://, memory://. Credentials and
        the endpoint come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

    Raises
    ------
    StoreError
        If it is neither, or what the URL names cannot be spoken to.
    """

    def __init__(self, where: str | Path | Place) -> None:
        if isinstance(where, Place):
            where = where.text
        if not isinstance(where, (str, Path)) or "\0" in str(where):
            raise StoreError(f"{where!r} is no path")
        self.text: str = str(where)
        self.remote = "://" in self.text
        self.path = Path() if self.remote else Path(where).expanduser()
        if not self.remote:
            self.text = str(self.path)

    def __str__(self) -> str:
        return self.text

    def store(self, read_only: bool = False) -> Any:
        """What xarray and zarr take as a store; a folder must be there.

        Raises
        ------
        FileNotFoundError
            If it is not. (zarr would make it.)
        """
        if not self.remote:
            from zarr.storage import LocalStore

            if not self.path.exists():
                raise FileNotFoundError(f"there is no store at {self}")
            return LocalStore(self.path, read_only=read_only)
        from zarr.storage import ObjectStore

        return ObjectStore(self._objects(), read_only=read_only)

    def _objects(self) -> Any:
        try:
            import obstore
        except ImportError as error:
            raise InputError(
                f"{self.text} is in an object store, for which obstore is needed: "
                "pip install 'twotower[cloud]'"
            ) from error
        options = _client(self.text)
        try:
            return obstore.store.from_url(self.text, **options)
        except Exception as error:
            raise self.failed("cannot be used", error) from error

    def failed(self, what: str, error: Exception) -> StoreError:
        """An error that says what went wrong here, in one line."""
        words = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        return StoreError(f"{self.text} {what} ({type(error).__name__}: {words})")

    def holds(self) -> bool:
        """Whether anything is there.

        Raises
        ------
        StoreError
            If it cannot be told.
        """
        if self.remote:
            import obstore

            try:
                return any(chunk for chunk in obstore.list(self._objects(), chunk_size=1))
            except StoreError:
                raise
            except Exception as error:
                raise self.failed("cannot be looked into", error) from error
        try:
            return self.path.exists()
        except OSError as error:  # a name that is too long, or a folder one may not look into
            raise StoreError(f"{self.path} is no place for a store: {error.strerror}") from error

    def require_writable(self) -> None:
        """Refuse a folder in which nothing can be written; better before it is needed.

        Raises
        ------
        StoreError
            With the folder.
        """
        if self.remote:
            return
        folder = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise StoreError(
                f"{self.path} cannot be written: {folder} is no folder that can be written to"
            )

    def remove(self) -> None:
        """Remove what is there."""
        if self.remote:
            import obstore

            objects = self._objects()
            for chunk in obstore.list(objects):
                obstore.delete(objects, [entry["path"] for entry in chunk])
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def replace(self, write: Callable[[Any], object], overwrite: bool) -> None:
        """Write a whole store anew.

        A folder is written beside its place and moved there when it is whole, so that the
        old or the new one is there at every moment. In an object store the old one goes
        first.

        Parameters
        ----------
        write
            Takes the store and fills it.
        overwrite
            Whether it may replace one that is there.

        Raises
        ------
        StoreError
            If it cannot be written, or another has come into being meanwhile.
        """
        if self.remote:
            if not overwrite and self.holds():
                raise StoreError(f"{self} exists already")
            self.remove()
            try:
                write(self.store())
            except OSError as error:
                raise self.failed("cannot be written", error) from error
            return
        path = self.path
        work = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
        old = work.with_name(f"{work.name}-old")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(work)
            if path.exists():
                if not overwrite:
                    raise StoreError(f"{path} exists already")
                path.rename(old)
            work.rename(path)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error}") from error
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            for leftover in (work, old):
                shutil.rmtree(leftover, ignore_errors=True)


def _client(url: str) -> dict[str, Any]:
    """Options of an object store's client; plain http is taken where the endpoint says it.

    Raises
    ------
    StoreError
        If the endpoint is no address; obstore would panic.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    if url.startswith("s3") and endpoint and not re.match(r"https?://[^/]", endpoint):
        raise StoreError(f"AWS_ENDPOINT_URL={endpoint!r} is no address, such as http://host:9000")
    if url.startswith("s3") and endpoint.startswith("http://"):
        return {"client_options": {"allow_http": True}}
    return {}
