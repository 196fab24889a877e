# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk, so that a resumed run does not compile for minutes again."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from opsd_jax.errors import UserError
from opsd_jax.host.files import require_mounted

FOLDER = "compiled"  # in the workdir
_OPTION = "jax_compilation_cache_dir"
_LEAST = "jax_persistent_cache_min_compile_time_secs"


def folder_of(setting: str | None, workdir: Path) -> Path | None:
    """Where `train.compilation_cache` says that programs are kept; None leaves JAX as it is.

    Args:
      setting: "auto" is WORKDIR/compiled on accelerators, unless JAX_COMPILATION_CACHE_DIR names
        a folder already, and nothing on a CPU; any other text is a folder; None or "" is
        nothing.
      workdir: of the run.
    """
    if not setting:
        return None
    if setting != "auto":
        require_mounted(setting, "train.compilation_cache")
        return Path(setting).expanduser().absolute()
    named = getattr(jax.config, _OPTION)
    if jax.default_backend() == "cpu" or (named and named != _process_folder()):
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
    is_new = not folder.exists()
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
        if is_new:
            with contextlib.suppress(OSError):  # it holds programs
                folder.rmdir()


@contextlib.contextmanager
def process_programs() -> Iterator[None]:
    """JAX's compilation cache in a folder of this process until the context ends.

    For calls that a notebook repeats: each makes its functions anew, and none compiles what another
    has compiled. What is kept has its content as key, so a function that was changed is another.
    Where a folder is named already, as on accelerators by `kept_programs`, that is the cache.
    """
    if getattr(jax.config, _OPTION):
        yield
        return
    least = getattr(jax.config, _LEAST)
    jax.config.update(_LEAST, 0.0)  # JAX would leave out what compiles in a second
    _use(_process_folder())
    try:
        yield
    finally:
        _use(None)
        jax.config.update(_LEAST, least)


def keep_no_programs() -> None:
    """No cache in this process, whatever names a folder."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


@functools.cache
def _process_folder() -> str:
    """A folder that this process alone uses and leaves nothing of."""
    folder = tempfile.mkdtemp(prefix="opsd_jax_compiled_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _use(folder: str | None) -> None:
    jax.config.update(_OPTION, folder)
    compilation_cache.reset_cache()  # JAX looks at the setting once, at the first compilation
