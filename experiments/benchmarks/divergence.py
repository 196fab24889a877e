# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the divergence, forward and backward, dense against fused.

    python experiments/benchmarks/divergence.py [--vocab=151936] [--rows=4] [--length=256]
        [--width=256] [--dtype=float32] [--divergence=forward_kl] [--clip=none]
        [--token_blocks=64,128] [--vocab_block=0] [--frozen_head] [--repeats=3]

Prints one JSON line per case: `temporary_mb` is what the compiled program allocates besides its
inputs and outputs; `matmul_share` is the time of the head products that any exact method needs
(student and teacher logits, gradients to hidden states and head: four, or three with a frozen
head) over the time of the case. All cases are timed in turns and the medians compared, so that a
busy machine slows all of them alike.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from opsd_jax.divergence.losses import DivergenceConfig, token_divergence
from opsd_jax.model.head import Head


def make_inputs(args):
    """Random hidden states and one head for both sides; logits with a spread of about 2."""
    B, C, D, V = args.rows, args.length, args.width, args.vocab
    keys = jax.random.split(jax.random.key(0), 4)
    student = jax.random.normal(keys[0], (B, C, D))
    teacher = student + 0.3 * jax.random.normal(keys[1], (B, C, D))
    kernel = 2 * D**-0.5 * jax.random.normal(keys[2], (V, D))
    ids = jax.random.randint(keys[3], (B, C), 0, V)
    dtype = jnp.dtype(args.dtype)
    return student.astype(dtype), kernel.astype(dtype), teacher.astype(dtype), ids


def loss_and_gradient(config, frozen_head):
    """(student, kernel, teacher, ids) -> mean objective, diagnostics, gradients."""

    def loss(student, kernel, teacher, ids):
        mask = jnp.ones(ids.shape, bool)
        tokens = token_divergence(config, student, Head(kernel), teacher, Head(kernel), ids, mask)
        return jnp.mean(tokens.objective), tokens

    return jax.value_and_grad(loss, 0 if frozen_head else (0, 1), has_aux=True)


def matmul_floor(frozen_head):
    """The head products alone, on blocks of 256 tokens, so that memory stays out of it."""

    def products(student, kernel, teacher, ids):
        D = kernel.shape[1]
        size = min(256, ids.size)
        blocks = (x.reshape(-1, D)[: ids.size // size * size] for x in (student, teacher))

        def product(subscripts, x, y):
            return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)

        def body(total, rows):
            student, teacher = rows
            logits = product("nd,vd->nv", student, kernel).astype(student.dtype)
            other = product("nd,vd->nv", teacher, kernel).astype(student.dtype)
            hidden = product("nv,vd->nd", other, kernel)
            if not frozen_head:
                total = total + product("nv,nd->vd", logits, student)
            return total, (hidden, logits[:, 0])

        zero = jnp.zeros((1,) if frozen_head else kernel.shape, jnp.float32)
        return jax.lax.scan(body, zero, tuple(x.reshape(-1, size, D) for x in blocks))

    return products


def cases(args):
    """Name -> function to time."""
    fields = dict(name=args.divergence, clip=args.clip)
    yield "matmul_floor", matmul_floor(args.frozen_head)
    yield "dense", loss_and_gradient(DivergenceConfig(**fields), args.frozen_head)
    for block in args.token_blocks.split(","):
        fused = dict(fields, implementation="fused", token_block=int(block))
        if args.vocab_block:
            fused["vocab_block"] = args.vocab_block
        yield f"fused_{block}", loss_and_gradient(DivergenceConfig(**fused), args.frozen_head)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--clip", default="none")
    parser.add_argument("--token_blocks", default="64,128")
    parser.add_argument("--vocab_block", type=int, default=0)
    parser.add_argument("--frozen_head", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    inputs = make_inputs(args)
    compiled = {name: jax.jit(f).lower(*inputs).compile() for name, f in cases(args)}
    times = {name: [] for name in compiled}
    for repeat in range(args.repeats + 1):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            if repeat > 0:  # the first round pays for page faults and warm-up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    memory = {n: run.memory_analysis().temp_size_in_bytes for n, run in compiled.items()}
    for name, seconds in medians.items():
        row = dict(case=name, vocab=args.vocab, tokens=args.rows * args.length)
        row |= dict(width=args.width, dtype=args.dtype, divergence=args.divergence, clip=args.clip)
        row |= dict(
            device=jax.devices()[0].device_kind,
            seconds=round(seconds, 4),
            temporary_mb=round(memory[name] / 1e6, 1),
            time_over_dense=round(seconds / medians["dense"], 3),
            memory_over_dense=round(memory[name] / memory["dense"], 4),
            matmul_share=round(medians["matmul_floor"] / seconds, 3),
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
