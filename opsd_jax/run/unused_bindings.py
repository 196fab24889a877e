# SPDX-License-Identifier: Apache-2.0
"""Bindings of a config that change nothing, told by name: gin itself would ignore them."""

from __future__ import annotations

from collections.abc import Sequence

import gin

from opsd_jax.errors import UserError
from opsd_jax.run.gin_errors import fields_of
from opsd_jax.run.registry import AREAS, resolve

MODULE = "opsd_jax"  # of all that is registered here: gin knows train as opsd_jax.train
Key = tuple[str, str, str]  # scope, name, parameter; without a parameter it is a macro


def check_scopes(scopes: set[str]) -> None:
    """Refuses bindings in scopes that no reference of the config names: nothing reads them."""
    for (scope, selector), values in gin.config._CONFIG.items():
        module, _, name = selector.rpartition(".")
        binding = f"{scope}/{name}.{next(iter(values), '')}"
        if module != MODULE or not scope:  # what the user's own code calls is not known
            continue
        if name in AREAS:
            raise UserError(f"{binding} would be ignored: there is one {name}; leave out {scope}/")
        if not scopes.issuperset(scope.split("/")):
            raise UserError(
                f"{binding} would be ignored: nothing is written @{scope}/{name}(); the scopes in "
                f"use are {', '.join(sorted(scopes)) or 'none'}"
            )


def unused(bound: Sequence[Key], names: set[str], macros: set[str]) -> tuple[list[str], list[str]]:
    """A sentence for everything that is bound and that the experiment, once built, has not used.

    Args:
      bound: what is asked about.
      names, macros: of ours, all that the config names.

    Returns:
      (of what the config does not even name, of what it names somewhere and has replaced).
    """
    used = set(gin.config._OPERATIVE_CONFIG)
    others = {of for _, of in gin.config._CONFIG if not of.startswith((f"{MODULE}.", "gin."))}
    user_code = bool(others or gin.config._IMPORTS)  # what it calls is not known
    told: tuple[list[str], list[str]] = ([], [])
    for place, of in {"/".join(filter(None, key[:2])): key for key in reversed(bound)}.items():
        scope, name, field = of
        if not field:
            named, why = place in macros, f"nothing reads %{place}"
            area = next((area for area in AREAS if name in fields_of(resolve(area))), None)
            # The user's code may ask for a macro, but hardly for one named as a field is.
            fine = (user_code and area is None) or (place, "gin.macro") in used
            if area is not None:
                why += f"; did you mean {area}.{name}?"
        else:
            named, why = name in names, f"this experiment uses no @{place}"
            selector = gin.config._REGISTRY.get_match(name).selector
            fine = not selector.startswith(f"{MODULE}.") or (user_code and named)
            fine = fine or any(of == selector and _within(at, scope) for at, of in used)
        if not fine:
            binding = f"{place}.{field}" if field else place
            told[named].append(f"{binding} would be ignored: {why}")
    return told


def hidden(
    bound: Sequence[Key], called: set[tuple[str, str]], later: Sequence[Key] = ()
) -> list[str]:
    """A sentence for everything that is bound and that scopes bind again wherever gin looked.

    Args:
      bound: what is asked about.
      called: scope and name of all that gin has called to build the experiment.
      later: bindings that were meant to win.
    """
    told = []
    for scope, name, field in bound:
        selector = gin.config._REGISTRY.get_match(name).selector if field else ""
        scopes = {
            at
            for (at, of), values in gin.config._CONFIG.items()
            if of == selector and field in values and (at, name, field) not in later
        }
        places = [at for at, of in called if of == selector and _within(at, scope)]
        # Of all scopes that a place is in, the innermost is read.
        read = {max((s for s in scopes if _within(at, s)), key=len, default="") for at in places}
        if read and all(len(inner) > len(scope) for inner in read):
            binding = f"{name}.{field}"
            place = f"{scope}/{binding}" if scope else binding
            there = " and ".join(f"{inner}/{binding}" for inner in sorted(read))
            told.append(f"{place} would be ignored: {there} is what is read; bind that")
    return told


def _within(scope: str, outer: str) -> bool:
    return not outer or f"{scope}/".startswith(f"{outer}/")
