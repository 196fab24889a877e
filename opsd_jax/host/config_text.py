# SPDX-License-Identifier: Apache-2.0
"""config.gin as text: the bindings in which two operative configs differ.

Plain text in, no gin and no jax: the report reads hundreds of runs with it.
"""

from __future__ import annotations

import re

# Bindings that a resumed run may change: they alter neither the state nor the trajectory, but for
# rounding where the mesh is another.
FREE_TO_CHANGE = (
    "train.num_steps train.log_every_steps train.eval_every_steps train.checkpoint_every_steps "
    "train.checkpoint_every_minutes train.profile_steps train.compilation_cache train.hang_minutes "
    "train.keep_checkpoints train.num_samples_logged train.tensorboard train.wandb "
    "mesh.data mesh.model mesh.fully_sharded mesh.replica mesh.sequence"
).split()
FREE_AREAS = ("guard.",)
# Where an input lies may change too: what it is stands in the checkpoints (host/identity.py).
_PLACES = re.compile(
    r"(.*/)?((PretrainedModel|JsonlProblems|ParquetProblems|Benchmark)\.path|FinishedRun\.workdir"
    r"|RandomModel\.(config|tokenizer)|TestbedBase\.cache_dir)$"
)


def first_difference(old: str, new: str) -> str | None:
    """The first binding in which two operative configs differ, as a sentence; None if none does.

    Bindings in `FREE_TO_CHANGE` do not count, nor do paths of what is known by its content.
    """
    before, after = bindings(old), bindings(new)
    for name in sorted(before | after):
        if not is_free(name) and not _PLACES.match(name) and before.get(name) != after.get(name):
            was, now = (x.get(name, "(not bound)") for x in (before, after))
            return f"{name} was {was} and is now {now}"
    return None


def is_free(name: str) -> bool:
    """Whether a resumed run may change this binding."""
    return name in FREE_TO_CHANGE or name.startswith(FREE_AREAS)


def bindings(text: str) -> dict[str, str]:
    """name -> value of every binding of a gin text; continued lines are joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\n[ \t]+", " ", "\n".join(lines)).replace("\\ ", "").replace("\\\n", "")
    found = {}
    for line in joined.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name.strip()] = " ".join(value.split())
    return found
