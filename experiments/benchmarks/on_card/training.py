# SPDX-License-Identifier: Apache-2.0
"""Sections with an update: adapters, all parameters, and a whole step."""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from on_card.measuring import (
    compiled,
    costliest,
    matmul_rate,
    measured_memory,
    prompts,
    random_variables,
    rounded,
    with_adapters,
)
from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.method.batch import Batch
from opsd_jax.method.optimizer import OptimizerConfig, make_optimizer
from opsd_jax.method.teacher import initial
from opsd_jax.method.train_step import Method, init_state, train_step, update
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion

OFFICIAL_STEP = 36  # GPU-seconds a step of the official code takes on H100s


def needed(sizes, config):
    """Operations of one update: student forward and backward, teacher forward; 2 per multiply-add.

    Causal attention counts the half that is seen. With adapters, no gradient of a frozen matrix.
    """
    c, B, C = config, sizes.batch, sizes.completion
    heads = (c.num_heads + 2 * c.num_kv_heads + c.num_heads) * c.head_dim
    trunk = c.num_layers * c.embed_dim * (heads + 3 * c.mlp_dim)
    rank = c.lora.rank if c.lora else 0
    widths = [(c.embed_dim, c.num_heads * c.head_dim)] * 2  # q, o
    widths += [(c.embed_dim, c.num_kv_heads * c.head_dim)] * 2 + [(c.embed_dim, c.mlp_dim)] * 3
    adapters = c.num_layers * rank * sum(map(sum, widths))
    head = c.vocab_size * c.embed_dim

    def forward(tokens):
        attention = 2 * tokens**2 * c.num_heads * c.head_dim * c.num_layers
        return 2 * trunk * tokens, attention

    matrices, attention = forward(sizes.student + C)
    passes = (2, 2) if c.lora else (3, 3)  # forward, to the inputs (, to the weights)
    student = passes[0] * matrices + 3 * attention + passes[1] * 2 * head * C
    student += 3 * 2 * adapters * (sizes.student + C)
    teacher = sum(forward(sizes.teacher + C)) + 2 * head * C
    return B * (student + teacher)


def training(sizes, full, attention):
    """(method, state, batch): the recipe, all parameters or adapters, weights random."""
    config = sizes.model if full else with_adapters(sizes)
    config = dataclasses.replace(config, attention=attention)
    model, variables = random_variables(config)
    if full:  # float32 masters
        variables = {"params": jax.tree.map(lambda x: x.astype(jnp.float32), variables["params"])}
    trained = "params" if full else "lora"
    trainable = {trained: variables.pop(trained)}
    method = Method(
        model=model,
        rollout=RolloutConfig(sizes.completion, temperature=1.1, top_p=0.95, top_k=20),
        divergence=DivergenceConfig(
            clip="entry", temperature=1.1, implementation="fused", clip_threshold=0.05
        ),
        teacher=initial(),
        optimizer=make_optimizer(OptimizerConfig(max_grad_norm=0.1), 5e-6),
        num_micro_batches=sizes.micro_batches,
    )
    V, B = config.vocab_size, sizes.batch
    batch = Batch(prompts(B, sizes.student, V), prompts(B, sizes.teacher, V))
    return method, init_state(method, trainable, variables, jax.random.key(0)), batch


def fastest_attention(measure):
    """`measure(attention)` with the device's own kernel, or without it where that fails."""
    own = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend())

    def run(lines):
        if own is None or lines.guarded(f"attention = {own}", measure, own) is None:
            lines.guarded("attention = xla", measure, "xla")

    return run


def steps_of(function, state, *args, repeats):
    """Median seconds of calls that hand their (donated) state on to the next."""
    seconds, run = [], None
    run, said = compiled(function, state, *args, donate_argnums=0)
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        state, *rest = run(state, *args)
        jax.block_until_ready((state, rest))
        if repeat:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), said, lambda: run(state, *args)


def update_of(full, sizes, lines):
    """The half of a step that learns, on completions of full length."""

    def measure(attention):
        method, state, batch = training(sizes, full, attention)
        ids = prompts(sizes.batch, sizes.completion, method.model.config.vocab_size).ids
        zeros, seen = jnp.zeros(ids.shape, jnp.float32), jnp.ones(ids.shape, bool)
        completion = Completion(ids, seen, zeros, jnp.zeros(len(ids), bool), zeros)
        seconds, said, again = steps_of(
            functools.partial(update, method), state, batch, completion, repeats=sizes.repeats
        )
        operations = needed(sizes, method.model.config)
        rate = operations / seconds
        lines(
            case="update",
            attention=attention,
            seconds=rounded(seconds),
            needed_tflop=rounded(operations / 1e12, 4),
            tflops=rounded(rate / 1e12),
            mfu=rounded(rate / matmul_rate(sizes)),
            **said,
            **measured_memory(),
        )
        lines.guarded("profile", lambda: lines(case="update", costliest=costliest(again)))
        return True

    fastest_attention(measure)(lines)


def step(sizes, lines):
    """A whole step of the recipe with adapters: rollouts and update."""

    def measure(attention):
        method, state, batch = training(sizes, False, attention)
        seconds, said, _ = steps_of(
            functools.partial(train_step, method), state, batch, repeats=max(1, sizes.repeats - 1)
        )
        lines(
            case="step",
            attention=attention,
            gpu_seconds=rounded(seconds),
            official_over_ours=rounded(OFFICIAL_STEP / seconds),
            **said,
            **measured_memory(),
        )
        return True

    fastest_attention(measure)(lines)
