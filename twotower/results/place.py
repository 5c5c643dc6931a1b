"""Location of a store: a path, or the URL of an object store such as s3://bucket/run.zarr."""

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
    """Location of one store.

    Parameters
    ----------
    where
        A path, or a URL that obstore supports: s3://, gs://, az://, memory://. Credentials and
        the endpoint come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

    Raises
    ------
    StoreError
        If it is neither, or the object store cannot be used.
    """

    def __init__(self, where: str | Path | Place) -> None:
        if isinstance(where, Place):
            where = where.text
        if not isinstance(where, (str, Path)) or "\0" in str(where):
            raise StoreError(f"{where!r} is not a path")
        self.text: str = str(where)
        self.remote = "://" in self.text
        self.path = Path() if self.remote else Path(where).expanduser()
        if not self.remote:
            self.text = str(self.path)

    def __str__(self) -> str:
        return self.text

    def store(self, read_only: bool = False) -> Any:
        """Return the store for xarray and zarr; a folder must exist.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist. (zarr would make it.)
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
                f"{self.text} is in an object store, which needs obstore: "
                "pip install 'twotower[cloud]'"
            ) from error
        options = _client(self.text)
        try:
            return obstore.store.from_url(self.text, **options)
        except Exception as error:
            raise self.failed("cannot be used", error) from error

    def failed(self, what: str, error: Exception) -> StoreError:
        """Make an error for this location, in one line."""
        words = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        return StoreError(f"{self.text} {what} ({type(error).__name__}: {words})")

    def holds(self) -> bool:
        """Check whether something exists at this location.

        Raises
        ------
        StoreError
            If the location cannot be read.
        """
        if self.remote:
            import obstore

            try:
                return any(chunk for chunk in obstore.list(self._objects(), chunk_size=1))
            except StoreError:
                raise
            except Exception as error:
                raise self.failed("cannot be listed", error) from error
        try:
            return self.path.exists()
        except OSError as error:  # a name that is too long, or a folder without permission
            raise StoreError(f"{self.path} cannot be a store: {error.strerror}") from error

    def require_writable(self) -> None:
        """Check that the folder is writable, before it is needed.

        Raises
        ------
        StoreError
            If the folder is not writable.
        """
        if self.remote:
            return
        folder = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise StoreError(f"{self.path} cannot be written: {folder} is not a writable folder")

    def remove(self) -> None:
        """Remove the store."""
        if self.remote:
            import obstore

            objects = self._objects()
            for chunk in obstore.list(objects):
                obstore.delete(objects, [entry["path"] for entry in chunk])
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def replace(self, write: Callable[[Any], object], overwrite: bool) -> None:
        """Write a complete new store.

        A folder is written next to its final path and moved when complete, so the old or the
        new store exists at every moment. In an object store the old one is removed first.

        Parameters
        ----------
        write
            Function that fills the store.
        overwrite
            Whether it may replace an existing store.

        Raises
        ------
        StoreError
            If it cannot be written, or another store was made in the meantime.
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
    """Return the client options of an object store; http is allowed if the endpoint uses it.

    Raises
    ------
    StoreError
        If the endpoint is not an address; obstore would panic.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    if url.startswith("s3") and endpoint and not re.match(r"https?://[^/]", endpoint):
        raise StoreError(
            f"AWS_ENDPOINT_URL={endpoint!r} is not an address, such as http://host:9000"
        )
    if url.startswith("s3") and endpoint.startswith("http://"):
        return {"client_options": {"allow_http": True}}
    return {}
