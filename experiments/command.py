# SPDX-License-Identifier: Apache-2.0
"""How the scripts of this folder are called: what is the user's to mend is told in one sentence."""

import importlib.util
import sys
from collections.abc import Callable, Iterable

from opsd_jax.errors import UserError
from opsd_jax.fields import Natural
from opsd_jax.main import ended
from opsd_jax.run import flags


def parser(num_seeds: int | None = None, tunes: bool = False) -> flags.Parser:
    """Has --out and, of a study with seeds, --seeds.

    Args:
      num_seeds: how many if nothing is said; None has no such flag.
      tunes: whether seed 0 does and is not among them; there may be no other.
    """
    found = flags.Parser()
    if num_seeds is not None:
        kind, told = flags.count, None
        if tunes:
            kind, told = flags.bounded(Natural), "besides seed 0, which tunes"
        found.add_argument("--seeds", type=kind, default=num_seeds, help=told)
    found.add_argument("--out", type=flags.folder, required=True)
    return found


def check_names(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises a UserError for names that are not known, before anything runs."""
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"{flag}: there is no {', '.join(unknown)}, only {', '.join(known)}")


def require_matplotlib() -> None:
    """Told before the hours of training that come before the figure."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figure needs matplotlib: pip install '.[plot]'")


def call(main: Callable[[], None]) -> None:
    """Runs a script; ends with status 2 where `opsd` would."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(ended(str(error), 2))
