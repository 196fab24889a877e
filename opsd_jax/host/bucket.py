# SPDX-License-Identifier: Apache-2.0
"""Paths in an object store, gs://BUCKET/NAME and s3://BUCKET/NAME, through tensorstore.

tensorstore is what Orbax writes arrays with, and is there already. It finds credentials as the
vendors' tools do (GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, the
machine's service account; AWS_ACCESS_KEY_ID, ~/.aws, the instance's role). AWS_ENDPOINT_URL names
another store that speaks S3; it must know If-Match and If-None-Match, which the lock rests on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import tensorstore as ts

from opsd_jax.errors import UserError
from opsd_jax.host.files import split_bucket

# A wrong name or right is told at once; a network that is gone, after some two minutes.
_RETRIES = {"max_retries": 8}
CONTEXT = ts.Context({"gcs_request_retries": _RETRIES, "s3_request_retries": _RETRIES})
# Statuses that speak of the objects; all others are about reaching them.
_ABOUT_DATA = ("NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "INVALID_ARGUMENT", "OUT_OF_RANGE")


class BucketError(UserError):
    """The store cannot be reached or refuses; what lies there may be whole."""


def _s3(bucket: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "use_conditional_write": True}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION", "us-east-1")
    if "AWS_ACCESS_KEY_ID" in os.environ:  # or the SDK complains that there is no ~/.aws
        spec["aws_credentials"] = {"type": "environment"}
    return spec


_SPECS: dict[str, Callable[[str], dict[str, Any]]] = {
    "gs": lambda bucket: {"driver": "gcs", "bucket": bucket},
    "s3": _s3,
}


@contextlib.contextmanager
def told(what: str, data_too: bool = True) -> Iterator[None]:
    """Tells errors of tensorstore in a sentence, "cannot " + `what` + why.

    Args:
      data_too: also those that say that an object is missing or is not what it should be.

    Raises:
      BucketError: instead of tensorstore's.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError, OSError) as error:  # so tensorstore has it
        status = str(error).partition(":")[0]
        if status in _ABOUT_DATA and not data_too:
            raise
        reason = " ".join(str(error).partition(" [")[0].split())[:200]
        raise BucketError(f"cannot {what}: {reason}") from error


class BucketPath:
    """An object, or all objects whose names begin with it and a slash.

    Of pathlib's names those that are needed are here. There are no folders to make.
    """

    def __init__(self, url: str):
        scheme, self._bucket, self._key = split_bucket(url)
        self._url = f"{scheme}://{self._bucket}/{self._key}"
        self._spec = _SPECS[scheme](self._bucket)

    def __str__(self) -> str:
        return self._url

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self._url}/{name}")

    def spec(self) -> dict[str, Any]:
        """What tensorstore opens to find the objects below this path."""
        return self._spec | {"path": self._key + "/"}

    def names(self) -> list[str]:
        """Names of all objects below, relative and sorted; the store lists a thousand a request."""
        prefix = self._key + "/"
        below = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")  # "0" comes after "/"
        with told(f"list {self}"):
            found = self._store().list(below, strip_prefix_length=len(prefix)).result()
        return sorted(name.decode(errors="replace") for name in found)

    def exists(self) -> bool:
        return bool(self.names())

    def is_file(self) -> bool:
        return self.read()[0] is not None

    def read_text(self) -> str:
        found, _ = self.read()
        if found is None:
            raise FileNotFoundError(f"no object {self}")
        return found.decode()

    def read(self, unless: bytes | None = None) -> tuple[bytes | None, bytes]:
        """Its content, None where there is none, and the version for `write_if`.

        Args:
          unless: a version; if it still is that one, there is no content either.
        """
        with told(f"read {self}"):
            found = self._store().read(self._key, if_not_equal=unless).result()
        return (found.value if found.state == "value" else None), found.stamp.generation

    def write(self, content: bytes) -> bytes:
        """Replaces the whole object at once; gives its version."""
        with told(f"write {self}"):
            return self._store().write(self._key, content).result().generation

    def write_if(self, content: bytes | None, version: bytes) -> bytes | None:
        """Writes (None: deletes) if nobody has since `version` was read; else gives None."""
        if not version:  # tensorstore would take it for no condition at all
            raise ValueError(f"{self}: a conditional write needs a version")
        with told(f"write {self}"):
            stamp = self._store().write(self._key, content, if_equal=version).result()
        return stamp.generation or None

    def unlink(self) -> None:
        with told(f"delete {self}"):
            self._store().write(self._key, None).result()

    def rmtree(self) -> None:
        """Deletes all objects below."""
        prefix = self._key + "/"
        with told(f"delete {self}"):
            self._store().delete_range(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()

    def rename(self, target: BucketPath) -> None:
        """Copies all objects below, one by one, and then deletes them: stores have no rename."""
        for name in self.names():
            (target / name).write((self / name).read()[0] or b"")
        self.rmtree()

    def _store(self) -> ts.KvStore:
        return ts.KvStore.open(self._spec, context=CONTEXT).result()
