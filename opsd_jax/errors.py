# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "your input is wrong", as opposed to a bug."""

from collections.abc import Mapping


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, key, row or flag and what to do.

    The command line prints the sentence without a traceback and exits with status 2.
    """


def require(area: str, config: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Raises a UserError for the first field that is not as it must be.

    Args:
      area: what the user calls the config.
      config: has the fields.
      checks: field -> (whether it is fine, what is wanted).
    """
    for name, (fine, wanted) in checks.items():
        if not fine:
            raise UserError(f"{area}.{name} must be {wanted}, not {getattr(config, name)!r}")


def require_seed(name: str, seed: int) -> None:
    """Raises a UserError unless 0 <= seed < 2**32: JAX drops the upper bits without a word, and
    NumPy's generators take no negative one."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{name} must be from 0 to {2**32 - 1}, not {seed}")
