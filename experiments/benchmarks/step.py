# SPDX-License-Identifier: Apache-2.0
"""A training step on this machine: seconds of its halves, and the most memory it held.

    python experiments/benchmarks/step.py [--works=small,batch,vocabulary] [--turns=5] [--remat=…]
        [--trl=PYTHON, of an environment with trl: the same steps by its SDFTTrainer (step_trl.py)]
        [--tunix=PYTHON, of one with google-tunix: a like step of its parts (step_tunix.py)]

Qwen3's shape with 4 layers of 256 (8 heads, 4 of keys, MLP 768, the head is the embedding), random
weights, float32, full fine-tuning, generalised JSD, the teacher of the start, AdamW; prompts of 64
tokens, teacher's of 128; no completion stops early. Each work runs in a process of its own. `floor`
is the time of the update's products alone at the rate of one large product, measured in the same
process in turns with the step, so that a busy machine slows both; recomputation is not counted
(`opsd_jax/run/flops.py`).
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from on_card.measuring import prompts

from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.host.heap import compilers_memory_returned
from opsd_jax.method.batch import Batch
from opsd_jax.method.optimizer import OptimizerConfig, make_optimizer
from opsd_jax.method.teacher import initial
from opsd_jax.method.train_step import Method, TrainState, init_state, sample_completion, update
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.run.flops import Lengths, step_flops
from opsd_jax.sampling.config import RolloutConfig

PROMPT, TEACHER = 64, 128
PEERS = {"trl": "TRL", "tunix": "tunix"}
REMATS = {"none": False, "all": True, "keep_projections": "keep_projections"}


class Work(NamedTuple):
    batch: int
    completion: int
    vocabulary: int
    implementation: str


WORKS = {
    "small": Work(8, 64, 4096, "dense"),
    "batch": Work(32, 128, 4096, "dense"),
    "vocabulary": Work(4, 256, 151936, "fused"),
}


def method_of(work: Work, remat: str, implementation: str | None) -> Method:
    config = ModelConfig(
        *(work.vocabulary, 4, 256, 8, 4, 32, 768),
        rope_theta=1e6,
        tie_embeddings=True,
        qk_norm=True,
        remat=REMATS[remat],
    )
    return Method(
        model=Decoder(config),
        rollout=RolloutConfig(work.completion),
        divergence=DivergenceConfig(
            name="jensen_shannon", implementation=implementation or work.implementation
        ),
        teacher=initial(),
        optimizer=make_optimizer(OptimizerConfig(), 5e-6),
    )


def needed(work: Work, method: Method) -> float:
    """Model FLOPs of an update."""
    lengths = (np.full(work.batch, n) for n in (PROMPT, TEACHER, work.completion))
    flops = step_flops(method, Lengths(*lengths))
    assert flops is not None
    return flops[1]


def measure(work: Work, remat: str, implementation: str | None, turns: int) -> dict[str, float]:
    """Medians over `turns` of the halves of a step and of a large product, one after the other."""
    method = method_of(work, remat, implementation)
    batch = Batch(*(prompts(work.batch, width, work.vocabulary) for width in (PROMPT, TEACHER)))

    @jax.jit
    def init(key: jax.Array) -> TrainState:
        params = meta.unbox(init_variables(method.model, key))["params"]
        return init_state(method, {"params": params}, {}, key)

    state = init(jax.random.key(0))
    sample = jax.jit(functools.partial(sample_completion, method))
    learn = jax.jit(functools.partial(update, method), donate_argnums=0)
    matrix = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    rows: list[tuple[float, ...]] = []
    for _ in range(turns + 1):
        clock = [time.perf_counter()]
        completion = jax.block_until_ready(sample(state, batch))
        clock.append(time.perf_counter())
        state, _ = jax.block_until_ready(learn(state, batch, completion))
        clock.append(time.perf_counter())
        for _ in range(8):
            product(matrix).block_until_ready()
        clock.append(time.perf_counter())
        rows.append(tuple(np.diff(clock)))
    first = rows.pop(0)
    rollout, learning, products = (statistics.median(column) for column in zip(*rows, strict=True))
    rate = 8 * 2 * 1024**3 / products
    return {
        "rollout_s": rollout,
        "update_s": learning,
        "floor_s": needed(work, method) / rate,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "compile_s": sum(first[:2]) - rollout - learning,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", default=",".join(WORKS), help="comma between")
    parser.add_argument("--turns", type=int, default=5, help="medians over so many")
    parser.add_argument("--remat", choices=REMATS, default="all", help="what train.remat is")
    parser.add_argument("--implementation", help="of the divergence; a work's own without")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"of an environment with {peer}")
    parser.add_argument("--here", action="store_true", help="the one work, in this process")
    arguments = parser.parse_args()
    names = arguments.works.split(",")
    if unknown := set(names) - set(WORKS):
        parser.error(f"--works: no work {', '.join(sorted(unknown))}; {', '.join(WORKS)}")
    if arguments.here:
        options = (arguments.remat, arguments.implementation, arguments.turns)
        with compilers_memory_returned():  # as opsd train does
            print(json.dumps(measure(WORKS[names[0]], *options)))
        return
    columns = ["work", "by", "s a step", "rollout", "update", "update / floor", "peak MB"]
    print("| " + " | ".join([*columns, "compilation, s"]) + " |\n" + "|---" * 8 + "|", flush=True)
    for name in names:
        work = WORKS[name]
        found = run([sys.executable, __file__, "--here", *sys.argv[1:], f"--works={name}"])
        print(line(work, "opsd_jax", found), flush=True)
        for peer, title in PEERS.items():
            if python := getattr(arguments, peer):
                sizes = {"batch": work.batch, "completion": work.completion}
                sizes |= {"vocabulary": work.vocabulary, "turns": arguments.turns}
                script = str(Path(__file__).with_name(f"step_{peer}.py"))
                found = run([python, script, *(f"--{k}={v}" for k, v in sizes.items())])
                print(line(work, title, found), flush=True)


def run(command: list[str]) -> dict[str, float]:
    """The JSON object that a command prints last."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(work: Work, by: str, found: dict[str, float]) -> str:
    said = f"B {work.batch}, C {work.completion}, V {work.vocabulary:,}"
    seconds = (found["rollout_s"] + found["update_s"], found["rollout_s"], found["update_s"])
    cells = [said, by, *(f"{s:.3f}" for s in seconds)]
    cells.append(f"{found['update_s'] / found['floor_s']:.2f}" if "floor_s" in found else "")
    cells.append(f"{found['peak_mb']:,.0f}")
    cells.append(f"{found['compile_s']:.1f}" if "compile_s" in found else "")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
