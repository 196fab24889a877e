# SPDX-License-Identifier: Apache-2.0
"""Compile time of the whole train step by depth: layers are scanned, so it should hardly grow.

    python experiments/benchmarks/compile_time.py [--layers=4,28] [--new=128]

Lowers and compiles the fused step (rollout, both scorings, loss, gradient, AdamW) for abstract
arrays; nothing is allocated. Decoding is scanned at every depth here (`rollout.unroll_layers = 0`).
"""

import argparse
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
from flax.core import meta

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.method.batch import Batch
from opsd_jax.method.optimizer import OptimizerConfig, make_optimizer
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.method.train_step import Method, init_state, train_step
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Context


def seconds_to_compile(num_layers, new, prompt=64, batch=8):
    """(lowering, compilation) of one step."""
    model = Decoder(ModelConfig(4096, num_layers, 256, 8, 4, 32, 768, qk_norm=True))
    method = Method(
        model,
        RolloutConfig(new, unroll_layers=0),
        DivergenceConfig(),
        TeacherConfig().build(),
        make_optimizer(OptimizerConfig(), 1e-5),
    )

    def state():
        variables = meta.unbox(init_variables(model, jax.random.key(0)))
        return init_state(method, variables, {}, jax.random.key(0))

    row = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
    context = Context(row, jax.ShapeDtypeStruct((batch,), jnp.int32))
    start = time.perf_counter()
    lowered = jax.jit(partial(train_step, method)).lower(
        jax.eval_shape(state), Batch(context, context)
    )
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="4,28")
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    first = None
    for num_layers in map(int, args.layers.split(",")):
        lowering, compilation = seconds_to_compile(num_layers, args.new)
        total = lowering + compilation
        first = first or total
        row = dict(layers=num_layers, lower_s=round(lowering, 1), compile_s=round(compilation, 1))
        print(json.dumps(row | dict(over_first=round(total / first, 2))), flush=True)


if __name__ == "__main__":
    main()
