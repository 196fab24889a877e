# SPDX-License-Identifier: Apache-2.0
"""Does an experiment fit a TPU slice? Asks the TPU compiler, on any Linux machine, without a TPU.

    pip install '.[tpu]'
    python experiments/benchmarks/tpu_compile.py --gin_file=experiments/paper/qwen3_1p7b.gin \
        --model_config=models/Qwen3-1.7B/config.json --topology=v5e:4x4 --teacher=4096

Compiles the whole train step for that slice from shapes alone: no weights are read and no array is
made. Prints one JSON line: what arguments (weights, moments) and temporaries take on each chip.
"""

import argparse
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # Asks no metadata server, which is not there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch
from opsd_jax.method.train_step import jitted_step
from opsd_jax.model.sharding import batch_sharding, check_batch, on_mesh
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.run.assembly import assemble
from opsd_jax.run.config import load_experiment
from opsd_jax.sampling.prompts import Context


def slice_mesh(topology, model):
    """A `data x model` mesh of the chips of a slice that need not exist."""
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:
        raise SystemExit(f"--topology={topology}: {error}") from None
    shape = (len(devices) // model, model)
    return Mesh(
        np.array(devices).reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )


def compiled_step(experiment, config, mesh, widths):
    """The train step, lowered and compiled for the mesh. widths: of student and teacher prompts."""
    tokenizer = SimpleNamespace(
        vocab_size=config.vocab_size, pad_id=0, stop_ids=(0,), encode=lambda text: [0]
    )
    check_batch(experiment.train.batch_size, experiment.train.num_micro_batches, mesh)
    parts = assemble(experiment, config, tokenizer, mesh)
    rows = batch_sharding(mesh)

    def context(width):
        shape = (experiment.train.batch_size, width)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        return Context(ids, jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows))

    step = jitted_step(parts.method, parts.shardings, mesh)
    lower = on_mesh(step.lower, mesh, parts.rules)
    return lower(parts.abstract, Batch(*map(context, widths))).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", action="append", required=True)
    parser.add_argument("--gin_bindings", action="append", default=[])
    parser.add_argument("--model_config", required=True, help="a Hugging Face config.json")
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5e:4x4, v5p:2x2x2")
    parser.add_argument("--student", type=int, default=512, help="tokens of its prompts")
    parser.add_argument("--teacher", type=int, default=2048)
    args = parser.parse_args()
    try:
        experiment, _ = load_experiment(args.gin_file, args.gin_bindings)
        config = config_from_hf(json.loads(Path(args.model_config).read_text()))
        mesh = slice_mesh(args.topology, experiment.mesh.model)
        start = time.perf_counter()
        compiled = compiled_step(experiment, config, mesh, (args.student, args.teacher))
    except UserError as error:
        raise SystemExit(str(error)) from None
    memory = compiled.memory_analysis()
    row = dict(topology=args.topology, chips=mesh.size, student=args.student, teacher=args.teacher)
    row |= dict(
        arguments_gib=round(memory.argument_size_in_bytes / 2**30, 2),
        temporaries_gib=round(memory.temp_size_in_bytes / 2**30, 2),
        seconds=round(time.perf_counter() - start),
    )
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
