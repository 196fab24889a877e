# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation in JAX (arXiv 2601.18734): one model is student and teacher.

The names below are the stable Python interface. They are imported on first use, so that
`import opsd_jax` costs nothing and the numerical core needs jax, flax and optax alone.

    model, variables = opsd_jax.load_model(path)
    logits = opsd_jax.forward(model, variables, ids, lengths)
    completion = opsd_jax.rollout(model, variables, prompt_ids, prompt_lengths, key, config)
    opsd_jax.divergence.forward_kl(student_logits, teacher_logits)

The shape alphabet of the whole package: B batch, T tokens (queries), S keys, P student prompt,
Q teacher prompt, C completion, V vocabulary, D model width, F MLP width, L layers, N query heads,
K key/value heads, G = N / K, H head width, R LoRA rank, A micro-batches.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "opsd_jax.pretrained.interface",
    "forward": "opsd_jax.pretrained.interface",
    "rollout": "opsd_jax.sampling.rollout",
    "RolloutConfig": "opsd_jax.sampling.config",
    "Completion": "opsd_jax.sampling.prompts",
    "DivergenceConfig": "opsd_jax.divergence.losses",
    "train_step": "opsd_jax.method.train_step",
    "load_experiment": "opsd_jax.run.config",
    "UserError": "opsd_jax.errors",
}
_MODULES = ("divergence",)

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"opsd_jax.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'opsd_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
