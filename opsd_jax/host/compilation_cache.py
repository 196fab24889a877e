# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk, so that a resumed run does not compile for minutes again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from opsd_jax.errors import UserError
from opsd_jax.host.files import require_mounted

FOLDER = "compiled"  # in the workdir
_OPTION = "jax_compilation_cache_dir"


def folder_of(setting: str | None, workdir: Path) -> Path | None:
    """Where `train.compilation_cache` says that programs are kept; None leaves JAX as it is.

    Args:
      setting: "auto" is WORKDIR/compiled on accelerators, unless JAX_COMPILATION_CACHE_DIR names
        a folder already, and nothing on a CPU; any other text is a folder; None is nothing.
      workdir: of the run.
    """
    if setting is None or not setting:
        return None
    if setting != "auto":
        require_mounted(setting, "train.compilation_cache")
        return Path(setting).expanduser().absolute()
    if jax.default_backend() == "cpu" or getattr(jax.config, _OPTION):
        return None
    return workdir.absolute() / FOLDER


@contextlib.contextmanager
def kept_programs(setting: str | None, workdir: Path) -> Iterator[Path | None]:
    """JAX's persistent compilation cache in a folder of the run until the context ends.

    All processes of a pod read it, and the first one writes. What other hardware, another JAX or
    other flags compiled has another key and is not read.

    Yields:
      The folder, None where JAX was left as it is.

    Raises:
      UserError: the folder cannot be made.
    """
    folder = folder_of(setting, workdir)
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"train.compilation_cache: cannot make {folder}: {error.strerror}"
        ) from error
    before = getattr(jax.config, _OPTION)
    _use(os.fspath(folder))
    try:
        yield folder
    finally:
        _use(before)


def _use(folder: str | None) -> None:
    jax.config.update(_OPTION, folder)
    compilation_cache.reset_cache()  # JAX looks at the setting once, at the first compilation
