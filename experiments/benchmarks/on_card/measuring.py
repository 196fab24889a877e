# SPDX-License-Identifier: Apache-2.0
"""Sizes, lines, seconds and bytes: what the sections of accelerator.py share."""

import collections
import dataclasses
import glob
import json
import os
import re
import statistics
import tempfile
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from opsd_jax.model.config import LoraConfig, ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.sampling.prompts import Context

GIB = 2.0**30
NO_KERNELS = ("$", "while", "call", "ThunkExecutor")  # in the profile of a CPU


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the recipe's."""

    model: ModelConfig = ModelConfig(
        151936, 28, 2048, 16, 8, 128, 6144, 1e6, 1e-6, True, True, dtype="bfloat16"
    )
    rank: int = 64
    batch: int = 32
    student: int = 512  # tokens of its prompts
    teacher: int = 2048
    completion: int = 1024
    micro_batches: int = 4
    decode_prompt: int = 64
    decode_new: int = 512
    loss_tokens: int = 4096
    matmul: int = 8192
    copy_mib: int = 1024
    text: int = 2048  # tokens of the text that attention is compared on
    repeats: int = 3


TINY = Sizes(
    ModelConfig(300, 2, 32, 4, 2, 8, 48, 1e6, 1e-6, True, True, dtype="bfloat16"),
    4, 4, 6, 10, 8, 2, 5, 9, 24, 64, 1, 96, 1,
)  # fmt: skip


class Lines:
    """Writes one JSON line per measurement, at once."""

    def __init__(self, path: Path, section: str):
        self.path, self.section = path, section

    def __call__(self, **row):
        text = json.dumps({"section": self.section} | row)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    def guarded(self, case, function, *args):
        """Calls it; an error becomes a line, and None is returned."""
        try:
            return function(*args)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error}"[:400]
            self(case=case, error=told, at=f"{Path(where.filename).name}:{where.lineno}")


def rounded(x, digits=3):
    return float(f"{x:.{digits}g}")


def timed(run, repeats):
    """Median seconds of a call; one before does not count."""
    seconds = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if repeat:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compiled(function, *args, **options):
    """(executable, {"compile_s", what it says it will allocate})."""
    start = time.perf_counter()
    run = jax.jit(function, **options).lower(*args).compile()
    said = {"compile_s": rounded(time.perf_counter() - start)}
    memory = run.memory_analysis()
    for name in ("argument", "output", "temp", "alias"):
        size = getattr(memory, f"{name}_size_in_bytes", None)
        said |= {} if size is None else {f"compiled_{name}_gib": rounded(size / GIB)}
    return run, said


def measured_memory():
    """The most that this process has held so far, where the device counts it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"peak_gib": rounded(stats["peak_bytes_in_use"] / GIB)} if stats else {}


def copy_bandwidth(sizes):
    """Bytes per second read and written by x + 1 on a large array."""
    x = jnp.zeros(sizes.copy_mib * 2**18, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / timed(lambda: add(x), 5)


def matmul_rate(sizes):
    """Operations per second of a bfloat16 product of two large square matrices."""
    x = jnp.ones((sizes.matmul, sizes.matmul), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return 2 * sizes.matmul**3 / timed(lambda: product(x, x), 5)


def costliest(run, number=3):
    """The kernels that take most of a call's time on the device: {name: share}."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(path).planes)
    total = collections.Counter()
    for plane in [p for p in planes if p.name.startswith("/device:")] or planes:
        lines = list(plane.lines)
        # Kernels: "Stream #7(…)" on a GPU, "XLA Ops" on a TPU; other lines sum them up.
        for line in [x for x in lines if x.name.startswith(("Stream", "XLA Ops"))] or lines:
            for event in line.events:
                if not event.name.startswith(NO_KERNELS):
                    total[re.sub(r"[._]\d+\b", "", event.name)[:80]] += event.duration_ns
    everything = max(sum(total.values()), 1)
    return {name: rounded(t / everything) for name, t in total.most_common(number)}


def random_variables(config):
    """Random weights made on the device: bfloat16 parameters, float32 adapters."""
    model = Decoder(config)

    @jax.jit
    def make(key):
        variables = meta.unbox(init_variables(model, key))
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
        return variables | {"params": params}

    return model, make(jax.random.key(0))


def with_adapters(sizes):
    return dataclasses.replace(sizes.model, lora=LoraConfig(sizes.rank, 2.0 * sizes.rank))


def prompts(rows, width, vocab_size):
    ids = np.random.default_rng(0).integers(1, vocab_size, (rows, width)).astype(np.int32)
    return Context(jnp.asarray(ids), jnp.full((rows,), width, jnp.int32))
