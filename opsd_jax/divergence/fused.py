# SPDX-License-Identifier: Apache-2.0
"""Per-token divergences from hidden states and heads, one block of logits at a time.

Peak memory is a few [n, V] blocks, two on a CPU, whatever the number of tokens. The forward pass
already has each block's logits, so it also computes their gradient in closed form and pulls it
back to the hidden states and the head on the spot: four head matmuls in all (three when the head
is frozen), none recomputed in the backward pass. That works because the backward pass only has to
scale: each token's hidden gradient by that token's cotangent, and the head gradient by the
cotangent that all tokens share under a mean. When the cotangents differ from token to token,
the head gradient is recomputed block by block, so the result is exact for any use.

On a mesh, tokens stay on their `data` shard and each device multiplies with its own slice of
the vocabulary; only per-token numbers and hidden gradients cross devices.

Alphabet: N tokens of a device, n tokens of a block, U vocabulary rows of a device, D width.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.sharding import PartitionSpec

from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.divergence.rows import TokenDivergence, logit_gradient, prepare_rows, row_divergence
from opsd_jax.divergence.vocabulary import Vocabulary, VocabularyMesh
from opsd_jax.model.head import Head, head_logits
from opsd_jax.model.sharding import axis_size, platform


class Operands(NamedTuple):
    """The arrays of one call: [B, C, ...] over all devices, or a device's part of them.

    teachers: tuple of (hidden [B, C, D'], kernel [V, D']); ids, mask: [B, C].
    """

    hidden: jax.Array
    kernel: jax.Array
    teachers: tuple[tuple[jax.Array, jax.Array], ...]
    ids: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about one call."""

    config: DivergenceConfig
    softcaps: tuple[float | None, ...]  # of the student, then of each teacher
    vocab_size: int
    place: VocabularyMesh
    on_cpu: bool

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_size, self.place.vocab_axis)

    @property
    def token_block(self) -> int:
        return self.config.rows_of_logits(self.on_cpu)

    @property
    def vocab_block(self) -> int:
        return self.config.vocab_block or (4096 if self.on_cpu else 16384)

    def rows_at_once(self, block: int) -> int:
        """Rows of a block whose logits are looked at together, so that a CPU's caches hold them."""
        split = self.place.vocab_axis is not None  # each look costs some sums over devices
        return min(block, 2) if self.on_cpu and not split else block

    @property
    def equal_cotangents(self) -> bool:
        """Whether to bet on a plain mean: then the head gradient is made in the forward."""
        return not self.config.weights and not self.config.weighs_importance


def fused_divergence(
    config: DivergenceConfig,
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: tuple[jax.Array, ...],
    teacher_head: tuple[Head, ...],
    completion_ids: jax.Array,
    completion_mask: jax.Array,
    place: VocabularyMesh,
) -> TokenDivergence:
    """`token_divergence` without weights, in blocks; see there for the arguments."""
    heads = (student_head, *teacher_head)
    vocab_size, on_cpu = student_head.kernel.shape[0], platform() == "cpu"
    plan = _Plan(config, tuple(h.softcap for h in heads), vocab_size, place, on_cpu)
    teachers = tuple((h, head.kernel) for h, head in zip(teacher_hidden, teacher_head, strict=True))
    operands = Operands(
        student_hidden,
        student_head.kernel,
        jax.lax.stop_gradient(teachers),
        completion_ids,
        completion_mask,
    )
    tokens = _fused(plan, *operands)
    return jax.lax.stop_gradient(tokens).replace(objective=tokens.objective)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(plan, *operands):
    return _on_mesh(plan, _forward, False, False)(Operands(*operands))[0]


def _fused_fwd(plan, *operands):
    perturbed = [any(x.perturbed for x in jax.tree.leaves(op)) for op in operands[:2]]
    operands = Operands(*custom_vjp_primal_tree_values(operands))
    head_gradient = perturbed[1] and plan.equal_cotangents
    tokens, hidden_gradient, kernel_gradient = _on_mesh(
        plan, _forward, perturbed[0], head_gradient
    )(operands)
    needed_again = operands if perturbed[1] else None
    dtype = jnp.zeros((), operands.hidden.dtype)
    return tokens, (hidden_gradient, kernel_gradient, needed_again, dtype)


def _fused_bwd(plan, residuals, cotangents):
    hidden_gradient, kernel_gradient, operands, dtype = residuals
    cotangent = cotangents.objective
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None
    if hidden_gradient is not None:
        hidden_gradient = (cotangent[..., None] * hidden_gradient).astype(dtype.dtype)
    if operands is not None:
        summands = _on_mesh(plan, _head_gradient)(operands, cotangent, kernel_gradient)
        # One summand per batch shard; the compiler picks all-reduce or reduce-scatter.
        kernel_gradient = jnp.sum(summands, axis=0)[: plan.vocab_size]
        kernel_gradient = kernel_gradient.astype(operands.kernel.dtype)
    return hidden_gradient, kernel_gradient, None, None, None


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)


def _on_mesh(plan, function, *static):
    """`function(plan, *static, ...)` on every device's part, heads padded to divide."""
    place = plan.place
    local = partial(function, plan, *static)
    if place.mesh is None:
        return local
    rows, kernel = place.tokens, PartitionSpec(place.vocab_axis)
    shards = tuple(axis for axis in (*(place.batch_axis or ()), place.length_axis) if axis)
    summands = PartitionSpec(shards or None, place.vocab_axis)
    teachers = ((rows, kernel),) * (len(plan.softcaps) - 1)
    operands = Operands(rows, kernel, teachers, rows, rows)
    forward = function is _forward
    mapped = jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(operands,) if forward else (operands, rows, summands),
        out_specs=(rows, rows, summands) if forward else summands,
        # Every output is summed over the vocabulary axis by hand; the check would ask for
        # casts on all loop carries to learn the same.
        check_vma=False,
    )

    def padded(operands, *rest):
        pad = -plan.vocab_size % axis_size(place.mesh, place.vocab_axis)

        def prepared(kernel, hidden):
            # Narrow on its way over the mesh, which the compiler would have it travel wide.
            if kernel.dtype.itemsize > hidden.dtype.itemsize:
                kernel = nn.with_logical_constraint(kernel.astype(hidden.dtype), ("vocab", "embed"))
            return jnp.pad(kernel, ((0, pad), (0, 0))) if pad else kernel

        return mapped(
            operands._replace(
                kernel=prepared(operands.kernel, operands.hidden),
                teachers=tuple((h, prepared(k, h)) for h, k in operands.teachers),
            ),
            *rest,
        )

    return padded


# ---------------------------------------------------------------- on one device


class _Packed(NamedTuple):
    """A device's tokens with those that count first, cut into blocks.

    order: [M] places in the flat batch, M = num_blocks * n >= N; num_active: [] blocks that
    hold tokens that count, so that padding costs nothing; operands: rows [M, ...], zeroed where
    they do not count; block: n.
    """

    operands: Operands
    order: jax.Array
    num_active: jax.Array
    block: int

    def slice(self, i) -> Operands:
        cut = partial(_read, i, self.block)
        operands = self.operands
        return Operands(
            cut(operands.hidden),
            operands.kernel,
            tuple((cut(hidden), kernel) for hidden, kernel in operands.teachers),
            cut(operands.ids),
            cut(operands.mask),
        )

    def unpack(self, values: jax.Array, like: jax.Array) -> jax.Array:
        """[M, ...] in block order -> [B, C, ...] in batch order."""
        flat = jnp.zeros((like.size, *values.shape[1:]), values.dtype)
        flat = flat.at[self.order].set(values, mode="drop", unique_indices=True)
        return flat.reshape(*like.shape, *values.shape[1:])


def _pack(plan, operands: Operands) -> _Packed:
    N = operands.mask.size
    num_blocks = -(-N // plan.token_block)
    block = -(-N // num_blocks)
    block = -(-block // (few := plan.rows_at_once(block))) * few
    mask = jnp.pad(operands.mask.reshape(-1), (0, num_blocks * block - N))
    order = jnp.argsort(~mask, stable=True)
    mask = mask[order]

    def rows(x):
        flat = jnp.take(x.reshape(N, *x.shape[2:]), order, axis=0, mode="clip")
        return jnp.where(mask.reshape(-1, *[1] * (flat.ndim - 1)), flat, 0)

    packed = Operands(
        rows(operands.hidden),
        operands.kernel.astype(operands.hidden.dtype),
        tuple((rows(h), kernel.astype(h.dtype)) for h, kernel in operands.teachers),
        rows(operands.ids),
        mask,
    )
    num_active = -(-jnp.sum(mask, dtype=jnp.int32) // block)
    return _Packed(packed, order, num_active, block)


def _block(plan, part: Operands, want_gradient: bool):
    """A block's TokenDivergence [n], and d objective / d (hidden @ kernel^T) [n, U] or None.

    Both are 0 in rows that do not count. Some rows at a time, whose arrays a CPU's caches hold;
    their gradient takes the place of their logits, so that the block has no third array.
    """
    student = head_logits(Head(part.kernel, plan.softcaps[0]), part.hidden)
    teachers = tuple(
        head_logits(Head(kernel, cap), hidden)
        for (hidden, kernel), cap in zip(part.teachers, plan.softcaps[1:], strict=True)
    )
    n, few = len(part.mask), plan.rows_at_once(len(part.mask))
    if few == n:
        return _few_rows(plan, student, teachers, part.ids, part.mask, want_gradient)

    def body(i, carry):
        tokens, student = carry
        arrays = jax.tree.map(partial(_read, i, few), (student, teachers, part.ids, part.mask))
        new, gradient = _few_rows(plan, *arrays, want_gradient)
        tokens = jax.tree.map(partial(_write, i), tokens, new)
        return tokens, _write(i, student, gradient) if want_gradient else student

    carry = TokenDivergence.zeros(n, student.dtype), student
    tokens, gradient = jax.lax.fori_loop(0, n // few, body, carry)
    return tokens, gradient if want_gradient else None


def _few_rows(plan, student, teachers, ids, mask, want_gradient):
    """`_block` for logits [r, U] of the student and of each teacher."""
    cap = plan.softcaps[0]
    cap_slope = None if cap is None else 1 - jnp.square(student / cap)
    student, teachers = jax.tree.map(plan.vocabulary.without_padding, (student, teachers))
    rows = prepare_rows(plan.config, plan.vocabulary, student, teachers, ids)
    tokens = row_divergence(plan.config, plan.vocabulary, rows, ids)
    tokens = jax.tree.map(lambda x: jnp.where(mask, x.astype(student.dtype), 0), tokens)
    if not want_gradient:
        return tokens, None
    gradient = logit_gradient(plan.config, plan.vocabulary, rows)
    if cap_slope is not None:
        gradient = gradient * cap_slope
    return tokens, jnp.where(mask[:, None], gradient, 0)


def _forward(plan, want_hidden: bool, want_kernel: bool, operands: Operands):
    """TokenDivergence [B, C], d/d hidden [B, C, D] float32, d/d kernel [1, U, D] float32.

    The gradients are those of the sum of the objective over the tokens that count.
    """
    packed = _pack(plan, operands)
    M, (U, D) = packed.order.size, operands.kernel.shape
    real = jnp.promote_types(operands.hidden.dtype, jnp.float32)

    def body(i, carry):
        tokens, hidden_gradient, kernel_gradient = carry
        part = packed.slice(i)
        new, gradient = _block(plan, part, want_hidden or want_kernel)
        tokens = jax.tree.map(partial(_write, i), tokens, new)
        if want_hidden or want_kernel:
            pulled = jnp.zeros(part.hidden.shape, real) if want_hidden else None
            pulled, kernel_gradient = _pull_back(plan, gradient, part, pulled, kernel_gradient)
        if want_hidden:
            hidden_gradient = _write(i, hidden_gradient, _summed(plan, pulled))
        return tokens, hidden_gradient, kernel_gradient

    tokens, hidden_gradient, kernel_gradient = jax.lax.fori_loop(
        0,
        packed.num_active,
        body,
        (
            TokenDivergence.zeros(M, real),
            jnp.zeros((M, D), real) if want_hidden else None,
            jnp.zeros((U, D), real) if want_kernel else None,
        ),
    )
    tokens, hidden_gradient = jax.tree.map(
        lambda x: packed.unpack(x, operands.mask), (tokens, hidden_gradient)
    )
    return tokens, hidden_gradient, jax.tree.map(lambda x: x[None], kernel_gradient)


def _head_gradient(plan, operands: Operands, cotangent, unit_gradient):
    """d/d kernel [1, U, D] of sum(cotangent * objective), over this device's tokens.

    `unit_gradient` is the one for cotangents 1, or None. If all tokens that count share one
    cotangent it is only scaled, and the loop below runs zero times.
    """
    packed = _pack(plan, operands)
    weights = jnp.pad(cotangent.reshape(-1), (0, packed.order.size - cotangent.size))
    weights = weights[packed.order]
    total, num_blocks = jnp.zeros(operands.kernel.shape, weights.dtype), packed.num_active
    if unit_gradient is not None:
        shared = jnp.where(operands.mask.any(), weights[0], 0)
        equal = jnp.all(~packed.operands.mask | (weights == shared))
        total = unit_gradient[0] * jnp.where(equal, shared, 0)
        num_blocks = jnp.where(equal, 0, num_blocks)

    def body(i, total):
        part = packed.slice(i)
        _, gradient = _block(plan, part, want_gradient=True)
        weight = _read(i, packed.block, weights)
        return _pull_back(plan, gradient * weight[:, None], part, None, total)[1]

    return jax.lax.fori_loop(0, num_blocks, body, total)[None]


def _pull_back(plan, gradient, part: Operands, to_hidden, to_kernel):
    """to_hidden [n, D] + gradient kernel and to_kernel [U, D] + gradient^T hidden, where not None.

    Some vocabulary rows at a time: the product for the kernel would be a second array of its size,
    and XLA's CPU takes three times as long to contract 150,000 entries as to do so in parts.
    """
    U, step = gradient.shape[-1], min(plan.vocab_block, gradient.shape[-1])

    def add(start, size, sums):
        to_hidden, to_kernel = sums
        some = jax.lax.dynamic_slice_in_dim(gradient, start, size, axis=1)
        some = some.astype(part.hidden.dtype)
        if to_hidden is not None:
            rows = jax.lax.dynamic_slice_in_dim(part.kernel, start, size)
            to_hidden += jnp.einsum("nv,vd->nd", some, rows, preferred_element_type=to_hidden.dtype)
        if to_kernel is not None:
            product = jnp.einsum(
                "nv,nd->vd", some, part.hidden, preferred_element_type=to_kernel.dtype
            )
            old = jax.lax.dynamic_slice_in_dim(to_kernel, start, size)
            to_kernel = jax.lax.dynamic_update_slice_in_dim(to_kernel, old + product, start, axis=0)
        return to_hidden, to_kernel

    whole, sums = U // step, (to_hidden, to_kernel)
    sums = jax.lax.fori_loop(0, whole, lambda j, sums: add(j * step, step, sums), sums)
    return add(whole * step, U % step, sums) if U % step else sums


def _summed(plan, values):
    axis = plan.place.vocab_axis
    return values if axis is None else jax.lax.psum(values, axis)


def _read(i, size, array):
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _write(i, array, block):
    return jax.lax.dynamic_update_slice_in_dim(array, block, i * block.shape[0], axis=0)
