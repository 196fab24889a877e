# SPDX-License-Identifier: Apache-2.0
"""Sections without an update: the card, its kernels, decoding, and the loss alone."""

import functools
import os
import platform

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from on_card.measuring import (
    GIB,
    compiled,
    copy_bandwidth,
    costliest,
    matmul_rate,
    measured_memory,
    prompts,
    random_variables,
    rounded,
    timed,
    with_adapters,
)
from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.divergence.losses import token_divergence
from opsd_jax.model.head import Head
from opsd_jax.model.kv_cache import KV
from opsd_jax.model.sharding import num_bytes
from opsd_jax.model.text_attention import attend_in_blocks, flash, splash
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.rollout import rollout


def card(sizes, lines):
    """Card, versions, and the two rates that all shares are of."""
    device = jax.devices()[0]
    lines(
        device=device.device_kind,
        platform=device.platform,
        num_devices=jax.device_count(),
        memory_gib=rounded((device.memory_stats() or {}).get("bytes_limit", 0) / GIB),
        versions={m.__name__: m.__version__ for m in (jax, jax.lib, flax, optax, np)},
        python=platform.python_version(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        host_cpus=os.cpu_count(),
    )
    rate = lines.guarded("matmul", matmul_rate, sizes)
    copied = lines.guarded("copy", copy_bandwidth, sizes)
    lines(
        matmul_tflops=rate and rounded(rate / 1e12, 4),
        copy_gb_s=copied and rounded(copied / 1e9, 4),
    )


def kernels(sizes, lines):
    """Attention of a text to itself in every way this device has, against float64 NumPy."""
    c, T, rng = sizes.model, sizes.text, np.random.default_rng(0)
    K, G, H = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    q = jnp.asarray(rng.normal(size=(1, K, G, T, H)) * H**-0.5, jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(1, K, T, H)), jnp.bfloat16) for _ in range(2))
    exact_q, exact_k, exact_v = (np.asarray(x, np.float64) for x in (q, k, v))
    want = np.empty(q.shape)
    for head in np.ndindex(K, G):
        scores = exact_q[0][head] @ exact_k[0, head[0]].T
        scores[np.triu_indices(T, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want[0][head] = weights / weights.sum(-1, keepdims=True) @ exact_v[0, head[0]]
    positions, far = jnp.arange(T)[None], jnp.int32(2**30)
    ways = {
        "xla": lambda q, k, v: attend_in_blocks(q, KV(k.swapaxes(2, 3), v), positions, far, None),
        "cudnn": functools.partial(flash, window=None, softcap=None),
        "splash": functools.partial(splash, window=None, softcap=None),
    }
    here = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend())

    def compare(name):
        run = jax.jit(ways[name])
        error = np.abs(np.asarray(run(q, k, v), np.float64) - want).max()
        lines(
            case=f"attention_{name}",
            largest_error=rounded(error),
            largest_value=rounded(np.abs(want).max()),
            milliseconds=rounded(1e3 * timed(lambda: run(q, k, v), sizes.repeats)),
        )

    for name in filter(None, ("xla", here)):
        lines.guarded(f"attention_{name}", compare, name)


def decode(rows, sizes, lines):
    """New tokens of `rows` prompts: bare, with adapters, and with the recipe's top-k and top-p."""
    bandwidth = copy_bandwidth(sizes)
    recipe = dict(temperature=1.1, top_p=0.95, top_k=20)
    cases = {
        "bare": (sizes.model, {}),
        "adapters": (with_adapters(sizes), {}),
        "adapters, top-k and top-p": (with_adapters(sizes), recipe),
    }

    def measure(case, config, sampling, profiled):
        model, variables = random_variables(config)
        context = prompts(rows, sizes.decode_prompt, config.vocab_size)
        settings = RolloutConfig(sizes.decode_new, **sampling)
        function = functools.partial(rollout, model, config=settings)
        args = (variables, context.ids, context.lengths, jax.random.key(0))
        run, said = compiled(function, *args)
        seconds = timed(lambda: run(*args), sizes.repeats)
        per_token = 4 * config.num_layers * config.num_kv_heads * config.head_dim
        cache = rows * per_token * (sizes.decode_prompt + sizes.decode_new / 2)
        least = sizes.decode_new * (num_bytes(variables) + cache) / bandwidth
        lines(
            case=case,
            rows=rows,
            new=sizes.decode_new,
            seconds=rounded(seconds),
            tokens_per_s=round(rows * sizes.decode_new / seconds),
            milliseconds_a_token=rounded(1e3 * seconds / sizes.decode_new),
            share_of_floor=rounded(least / seconds),
            **said,
            **measured_memory(),
        )
        if profiled:
            lines(case=case, rows=rows, costliest=costliest(lambda: run(*args)))

    for case, (config, sampling) in cases.items():
        if rows < 100 or not sampling:
            profiled = case == "adapters" and rows < 100
            lines.guarded(case, measure, case, config, sampling, profiled)


def loss(sizes, lines):
    """Forward KL and its gradient to hidden states and head: fused, dense, and optax."""
    c, N = sizes.model, sizes.loss_tokens
    keys = jax.random.split(jax.random.key(0), 3)
    student = jax.random.normal(keys[0], (1, N, c.embed_dim), jnp.bfloat16)
    teacher = student + 0.3 * jax.random.normal(keys[1], student.shape, jnp.bfloat16)
    kernel = 2 * c.embed_dim**-0.5 * jax.random.normal(keys[2], (c.vocab_size, c.embed_dim))
    kernel, ids = kernel.astype(jnp.bfloat16), jnp.zeros((1, N), jnp.int32)

    def ours(implementation, student, kernel, teacher):
        config = DivergenceConfig(implementation=implementation)
        heads = (Head(kernel), Head(jax.lax.stop_gradient(kernel)))
        seen = jnp.ones(ids.shape, bool)
        tokens = token_divergence(config, student, heads[0], teacher, heads[1], ids, seen)
        return jnp.mean(tokens.objective)

    def with_optax(student, kernel, teacher):
        def logps(hidden, kernel):
            logits = jnp.einsum("bcd,vd->bcv", hidden, kernel, preferred_element_type=jnp.float32)
            return jax.nn.log_softmax(logits)

        target = jax.lax.stop_gradient(logps(teacher, kernel))
        kl = optax.losses.kl_divergence_with_log_targets(logps(student, kernel), target)
        return jnp.mean(kl)

    def measure(case, function):
        args = (student, kernel, teacher)
        run, said = compiled(jax.value_and_grad(function, (0, 1)), *args)
        value = float(run(*args)[0])
        seconds = timed(lambda: run(*args), sizes.repeats)
        lines(
            case=case, tokens=N, seconds=rounded(seconds), loss=rounded(value, 6), **said
        )  # The peak is that of the process, so of the largest case: what is compiled says more.

    for name in ("fused", "dense"):
        lines.guarded(name, measure, name, functools.partial(ours, name))
    lines.guarded("optax", measure, "optax", with_optax)
