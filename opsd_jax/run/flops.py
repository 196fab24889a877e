# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs of a step and bytes read while decoding, by formula.

Model FLOPs are those that the mathematics needs (PaLM, arXiv 2204.02311, appendix B): 2 per weight
and token of a product, 4 N H per query and key that it sees, twice that again for gradients; no
padding, no recomputation (remat), no embedding look-up, no norms. With adapters the frozen
matrices have no gradient of their own, which spares a third.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import not_
from typing import NamedTuple

import numpy as np

from opsd_jax.method.completions import MixedRollouts, TeacherRollouts
from opsd_jax.method.mix import Anchor, Likelihood, terms_of
from opsd_jax.method.train_step import Method
from opsd_jax.model.config import ModelConfig


class Lengths(NamedTuple):
    """Tokens of each row of a global batch, [B] int.

    views: of the teacher's further prompts; own: for the teacher's and each of these, whether they
    differ within a group; () is none.
    """

    student: np.ndarray  # prompt
    teacher: np.ndarray  # prompt
    completion: np.ndarray
    views: tuple[np.ndarray, ...] = ()
    own: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Products:
    """Weights that one token is multiplied with: in the layers, in their adapters, in the head."""

    layers: int
    adapters: int
    head: int


def products(config: ModelConfig) -> Products:
    """Numbers of weights; of experts, those that a token picks."""
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    queries, keys = config.num_heads * H, config.num_kv_heads * H
    shapes = {"q_proj": (D, queries), "k_proj": (D, keys), "v_proj": (D, keys)}
    shapes |= {"o_proj": (queries, D)}
    mlp = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
    layer = sum(a * b for a, b in shapes.values())
    layer += max(1, config.experts_per_token) * 3 * D * F + config.num_experts * D
    adapted = shapes if config.num_experts else shapes | mlp
    lora = config.lora
    adapter = sum(
        lora.rank * (a + b) for name, (a, b) in adapted.items() if lora and lora.covers(name)
    )
    return Products(config.num_layers * layer, config.num_layers * adapter, D * config.vocab_size)


def seen(config: ModelConfig, lengths: np.ndarray) -> float:
    """Σ over rows, positions and layers of the positions that a token attends to, itself too."""
    n = lengths.astype(np.float64)
    total = 0.0
    for layer in range(config.num_layers):
        w = np.minimum(n, config.window or 0) if config.windows(layer) else n
        total += float(np.sum(w * (w + 1) / 2 + (n - w) * w))
    return total


def forward_flops(
    config: ModelConfig, prompt: np.ndarray, completion: np.ndarray, adapters: bool = True
) -> float:
    """One pass over the texts of prompt and completion, with logits of the completion alone."""
    return sum(forward_parts(config, prompt, completion, adapters))


def training_flops(config: ModelConfig, prompt: np.ndarray, completion: np.ndarray) -> float:
    """`forward_flops` and the gradient of what is trained."""
    frozen, trained, attended = forward_parts(config, prompt, completion)
    return (2 if config.lora else 3) * frozen + 3 * (trained + attended)


def forward_parts(
    config: ModelConfig, prompt: np.ndarray, completion: np.ndarray, adapters: bool = True
) -> tuple[float, float, float]:
    """(products with the model's matrices, with adapters, attention)."""
    weights = products(config)
    tokens, logits = float(np.sum(prompt + completion)), float(np.sum(completion))
    pair = 4 * config.num_heads * config.head_dim
    return (
        2 * (weights.layers * tokens + weights.head * logits),
        2.0 * weights.adapters * tokens * adapters,
        pair * seen(config, prompt + completion),
    )


def writer_prompts(method: Method, lengths: Lengths) -> np.ndarray:
    """[B] lengths of the prompts that the completions were sampled from."""
    source = method.completions
    if isinstance(source, TeacherRollouts):
        return lengths.teacher
    if isinstance(source, MixedRollouts):
        own = np.arange(len(lengths.student)) % source.of < source.of - source.teacher_rows
        return np.where(own, lengths.student, lengths.teacher)
    return lengths.student


def step_flops(method: Method, lengths: Lengths) -> tuple[float, float] | None:
    """Model FLOPs of (rollout, update) of a global batch; None where other texts are read, too: a
    teacher's analyses (teacher.reasons), references beside completions (Likelihood.of).

    The student learns from every completion once a pass; others read it as `readings` has it. What
    the rows of a group have in common is read once.
    """
    others = any(isinstance(term, Likelihood) and term.of for term in terms_of(method.objective))
    if method.reasoner is not None or others:
        return None
    config, n = method.model.config, lengths.completion

    def saved(count: Callable, config: ModelConfig, prompts: np.ndarray) -> float:
        again = repeated(method, prompts)
        return count(config, again, 0 * again)

    rollout = 0.0
    if method.completions.generates:
        prompts = writer_prompts(method, lengths)
        every = forward_flops(config, prompts, 0 * prompts)
        rollout = forward_flops(config, prompts, n) - every + prefill_flops(method, lengths)
    update = training_flops(config, lengths.student, n)
    update -= saved(training_flops, config, lengths.student)
    for reader, prompts, shared in readings(method, lengths):
        update += forward_flops(reader, prompts, n, adapters=False)
        if shared:
            update -= saved(partial(forward_flops, adapters=False), reader, prompts)
    return rollout, method.num_updates * update


def prefill_flops(method: Method, lengths: Lengths) -> float:
    """Of the prompts that a rollout reads: a group's once, but where rows are two roles'."""
    prompts = writer_prompts(method, lengths)
    if not isinstance(method.completions, MixedRollouts):
        prompts = prompts[np.arange(len(prompts)) % method.group_size == 0]
    return forward_flops(method.model.config, prompts, 0 * prompts)


def readings(method: Method, lengths: Lengths) -> list[tuple[ModelConfig, np.ndarray, bool]]:
    """Who reads the completions without learning: (config, [B] prompts, whether groups share them).

    The teacher once in each of its contexts, where a term looks at it, and the initial policy for
    an `Anchor`.
    """
    terms, config = terms_of(method.objective), method.model.config
    found = []
    if any(isinstance(term, Anchor) for term in terms):
        found.append((config, lengths.student, True))
    if any(getattr(term, "reads_teacher", True) for term in terms):
        teacher = method.external.config if method.external else config
        contexts = (lengths.teacher, *lengths.views)
        own = lengths.own or (False,) * len(contexts)
        found += [(teacher, *each) for each in zip(contexts, map(not_, own), strict=True)]
        if method.divergence.target is not None and not lengths.views:  # without privilege
            found.append((teacher, lengths.student, True))
    return found


def repeated(method: Method, prompts: np.ndarray) -> np.ndarray:
    """Of [B] prompts those that an earlier row of the group has, too."""
    return prompts[np.arange(len(prompts)) % method.group_size > 0]


def decoding_bytes(
    method: Method, lengths: Lengths, weight_bytes: int, data: int, model: int
) -> float | None:
    """The least that one device reads from its memory to decode a batch; None where unknown.

    Every weight of a product once per decoded token, and the keys and values of what is there:
    sampling reads the whole model along `data`, a part of it along `model`.

    Args:
      method: whose rollout.
      lengths: of the global batch.
      weight_bytes: of a weight that is stored for the rollout.
      data, model: devices along each axis of the mesh.
    """
    config = method.model.config
    if not method.completions.generates or method.external or config.num_experts:
        return None  # which experts a batch wakes is not known here
    rollout, weights = method.rollout, products(config)
    prompts, n = writer_prompts(method, lengths), lengths.completion
    cached = seen(config, prompts + n) - seen(config, prompts)
    value_bytes = 4
    if (rollout.dtype or config.dtype) == "bfloat16":
        value_bytes, weight_bytes = 2, min(weight_bytes, 2)
    if rollout.weights == "int8":
        weight_bytes = 1
    entry = 2 * config.num_kv_heads * config.head_dim * value_bytes
    steps = int(np.max(n, initial=0))
    whole = (weights.layers + weights.head) * weight_bytes + weights.adapters * 4
    return (steps * whole + entry * cached / data) / model
