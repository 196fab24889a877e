# SPDX-License-Identifier: Apache-2.0
"""Settings that another setting leaves unread, for whoever changed one and sees no difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

from opsd_jax.data.templates import BEFORE
from opsd_jax.divergence.config import USE_BETA
from opsd_jax.method.mix import Distillation, terms_of
from opsd_jax.run.experiment import Experiment


class Rule(NamedTuple):
    """fields: of an area, that nothing reads; why: what would have to be otherwise."""

    area: str
    fields: tuple[str, ...]
    why: str


def unread(experiment: Experiment, bound: Collection[tuple[str, str]]) -> list[str]:
    """A sentence for each setting that is bound, is not its default and is read by nothing.

    Args:
      experiment: as it was built.
      bound: (area, field) of what is asked about.
    """
    told = []
    for area, fields, why in rules(experiment):
        settings: Any = getattr(experiment, area)
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}
        told += [
            f"{area}.{name} has no effect: {why}"
            for name in fields
            if (area, name) in bound and getattr(settings, name) != defaults[name]
        ]
    return told


def rules(experiment: Experiment) -> list[Rule]:
    """Those that hold of this experiment."""
    divergence, teacher = experiment.divergence, experiment.teacher
    contexts, terms = experiment.contexts, terms_of(experiment.train.objective)
    own = any(not type(term).__module__.startswith("opsd_jax.") for term in terms)
    # A function of tokens may look at the divergence and at all views.
    free = own or any(getattr(term, name, ()) for term in terms for name in ("weights", "shape"))
    found = []
    if not free and not any(isinstance(term, Distillation) for term in terms):
        fields = "name beta clip clip_threshold support top_k completion weights target"
        why = "train.objective has no @Distillation()"
        found.append(Rule("divergence", tuple(fields.split()), why))
    else:
        if divergence.name not in USE_BETA:
            why = "divergence.name is not one of " + " and ".join(map(repr, USE_BETA))
            found.append(Rule("divergence", ("beta",), why))
        if divergence.clip == "none":
            found.append(Rule("divergence", ("clip_threshold",), "divergence.clip is 'none'"))
        if divergence.support == "full":
            why = "divergence.support is 'full'"
            found.append(Rule("divergence", ("top_k", "completion"), why))
    for weights, field in (("ema", "ema_decay"), ("snapshot", "snapshot_every_steps")):
        if teacher.model is not None:
            found.append(Rule("teacher", (field,), "teacher.model is what teaches"))
        elif teacher.weights != weights:
            found.append(Rule("teacher", (field,), f"teacher.weights is not {weights!r}"))
    if not free and not divergence.weights and divergence.target is None:
        why = "neither divergence.target nor a function of tokens looks at them"
        found.append(Rule("contexts", ("views",), why))
    if "verdict" not in contexts.after_rollout:
        verdicts = ("verdict_right", "verdict_wrong")
        found.append(Rule("contexts", verdicts, "no context of the teacher shows {verdict}"))
    # A function may return None, and a column of the data may be empty.
    is_text = isinstance(contexts.template("teacher"), str)
    if is_text and contexts.shows("teacher") <= set(BEFORE):
        why = "contexts.teacher shows neither attempts nor columns that a row may lack"
        found.append(Rule("contexts", ("teacher_fallback",), why))
    return found
