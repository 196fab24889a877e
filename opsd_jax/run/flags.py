# SPDX-License-Identifier: Apache-2.0
"""Types of the command line's values: what argparse asks of each before anything is loaded.

Each takes the text behind a flag and raises argparse.ArgumentTypeError, which the parser tells with
the flag's name.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Seed, check
from opsd_jax.host.files import is_bucket, require_mounted, split_bucket


class Parser(argparse.ArgumentParser):
    """Tells a usage error in one sentence, as every other one."""

    def error(self, message: str) -> Any:
        message = re.sub(r"^argument (\S+): (?=must|cannot)", r"\1 ", " ".join(message.split()))
        shortened = message if len(message) <= 300 else message[:300] + "..."
        raise UserError(f"{self.prog}: {shortened}; see {self.prog} --help")


def text(value: str) -> str:
    """Text that can be encoded and written."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be valid Unicode, not {_shown(value)}") from None
    if "\0" in value:
        raise argparse.ArgumentTypeError(f"must hold no NUL character, not {_shown(value)}")
    return value


def some_text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return text(value)


def integer(value: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,40}", value.strip()):  # int() gives up at 4,300 digits
        raise argparse.ArgumentTypeError(f"must be an integer, not {_shown(value)}")
    return int(value)


def bounded(hint: Any) -> Callable[[str], int]:
    """The type of an integer within an annotation's bounds, such as `fields.Count`."""

    def bounded_integer(value: str) -> int:
        found = integer(value)
        try:
            check("", found, hint)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None
        return found

    return bounded_integer


count, seed = bounded(Count), bounded(Seed)


def number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {_shown(value)}") from None


def address(value: str) -> str:
    """HOST:PORT of a process that others connect to."""
    host, _, port = some_text(value).rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host) or not re.fullmatch(
        r"[0-9]{1,5}", port
    ):
        raise argparse.ArgumentTypeError(
            f"must be HOST:PORT, such as 10.0.0.1:8476, not {_shown(value)}"
        )
    if not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"must end with a port from 1 to 65535, not {int(port)}")
    return value


def level(value: str) -> float:
    """An accuracy to reach."""
    found = number(value)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], not {value}")
    return found


def step(value: str) -> int | str:
    """A checkpoint's number, or "best"."""
    if value == "best":
        return value
    if re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    raise argparse.ArgumentTypeError(f"must be a number or 'best', not {_shown(value)}")


def folder(value: str) -> str:
    """A folder that is there or can be made."""
    if _exists(value) and not os.path.isdir(value):
        raise argparse.ArgumentTypeError(f"must be a folder, not {_kind(value)}")
    return value


def workdir(value: str) -> str:
    """A folder that is there or can be made, or one in a bucket."""
    if not is_bucket(some_text(value)):
        return folder(value)
    try:
        split_bucket(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def file(value: str) -> str:
    """A file to read or to write; whether it is there is told by its reader."""
    if _exists(value) and not os.path.isfile(value):
        raise argparse.ArgumentTypeError(f"must be a file, not {_kind(value)}")
    return value


def file_or_folder(value: str) -> str:
    """Not a pipe or a device, whose reading may never end."""
    if _exists(value) and not (os.path.isdir(value) or os.path.isfile(value)):
        raise argparse.ArgumentTypeError(f"must be a folder or a file, not {_kind(value)}")
    return value


def labelled_folder(value: str) -> str:
    """DIR or LABEL=DIR."""
    if not os.path.isdir(some_text(value)):
        labelled = "=" in value and not is_bucket(value)
        workdir(value.partition("=")[2] if labelled else value)
    return value


def _exists(value: str) -> bool:
    """Whether there is something of that name; refuses what no file system takes for a name."""
    try:
        require_mounted(some_text(value))
        os.stat(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except FileNotFoundError:
        return False
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be {_shown(value)}: {error.strerror}") from None
    return True


def _kind(value: str) -> str:
    what = (
        "folder" if os.path.isdir(value) else "file" if os.path.isfile(value) else "pipe or device"
    )
    return f"the {what} {_shown(value)}"


def _shown(value: str) -> str:
    return ascii(value if len(value) <= 60 else value[:60] + "...")
