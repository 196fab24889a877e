# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of sampling; one JSON line per case, ratios within one run.

    python experiments/benchmarks/rollout.py                      against transformers' generate
    python experiments/benchmarks/rollout.py --refill --new=512   slots against plain batches
    python experiments/benchmarks/rollout.py --floor --shape=qwen3_1p7b --dtype=bfloat16 --new=1024

The weights are random: a small Qwen3 (hidden 256, 4 layers, 8 heads / 4 kv, V 4,096), the shape of
Qwen3-1.7B, or a checkpoint (--model). Compile time is stated and not part of any other number.
The cases of a batch size are timed in turns and medians compared, so that a busy machine slows all
of them alike. --refill: stop ids that make lengths geometric with a mean of about --new / 8; with
--samples=8 every prompt is asked so often, as an evaluation does, and slots read it once.
--weights=int8: as rollout.weights, and the gap in log-probability to scoring, by sampled token.
--floor: the time of a step over the time to read weights and cache once at the measured copy
bandwidth, and the three largest costs of the profile.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

import opsd_jax
from opsd_jax.divergence.likelihood import token_logps
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.head import output_head
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, make_mesh, num_bytes
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Context
from opsd_jax.sampling.rollout import rollout
from opsd_jax.sampling.slots import Sampler

SHAPES = {
    "small": ModelConfig(4096, 4, 256, 8, 4, 32, 768),
    "qwen3_1p7b": ModelConfig(151936, 28, 2048, 16, 8, 128, 6144, rope_theta=1e6),
}
QWEN3 = dict(tie_embeddings=True, qk_norm=True, norm_eps=1e-6)


def load(args):
    """(decoder, variables): a checkpoint, or random weights in one of the shapes."""
    if args.model:
        return opsd_jax.load_model(args.model, args.dtype)
    config = dataclasses.replace(SHAPES[args.shape], dtype=args.dtype, **QWEN3)
    model = Decoder(config)

    @jax.jit
    def random(key):
        variables = meta.unbox(init_variables(model, key))
        return jax.tree.map(lambda x: x.astype(args.dtype), variables)

    return model, random(jax.random.key(0))


def prompts(args, rows, vocab_size):
    return np.random.default_rng(0).integers(1, vocab_size, (rows, args.prompt)).astype(np.int32)


def our_case(args, batch, model, variables):
    """(seconds to compile, function to time) of one jitted rollout."""
    config = RolloutConfig(args.new, temperature=args.temperature, unroll_layers=args.unroll_layers)
    config = dataclasses.replace(config, weights=args.weights)
    ids = jnp.asarray(prompts(args, batch, model.config.vocab_size))
    lengths = jnp.full((batch,), args.prompt, jnp.int32)
    start = time.perf_counter()
    jitted = jax.jit(functools.partial(rollout, model, config=config))
    run = jitted.lower(variables, ids, lengths, jax.random.key(0)).compile()
    seconds = time.perf_counter() - start
    return seconds, lambda: jax.block_until_ready(run(variables, ids, lengths, jax.random.key(0)))


def logp_gap(args, model, variables, completion):
    """Mean and largest |log-probability while sampling - while scoring| of the sampled tokens."""
    ids = jnp.asarray(prompts(args, len(completion.ids), model.config.vocab_size))
    context = Context(ids, jnp.full((len(ids),), args.prompt, jnp.int32))

    @jax.jit
    def score(variables, completion):
        hidden = completion_hidden(model, variables, context, completion)
        head = output_head(variables["params"], model.config)
        return token_logps(head, hidden, completion.ids, completion.mask, None)[0]

    gap = np.abs(score(variables, completion) - completion.logps)[np.asarray(completion.mask)]
    return dict(mean_logp_gap=float(f"{gap.mean():.2g}"), max_logp_gap=float(f"{gap.max():.2g}"))


def torch_cases(args, batch, folder):
    """Name -> function to time of transformers' generate with dynamic and static cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts(args, batch, model.config.vocab_size), dtype=torch.long)
    sampling = dict(do_sample=args.temperature > 0, top_k=0, max_new_tokens=args.new)
    if args.temperature > 0:
        sampling["temperature"] = args.temperature

    def run(**cache):
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **sampling, **cache)
        assert out.shape[1] == args.prompt + args.new

    return {
        "transformers_dynamic": run,
        "transformers_static": functools.partial(run, cache_implementation="static"),
    }


def in_turns(cases, repeats):
    """Name -> median seconds; one round of every case after the other."""
    times = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if repeat > 0:  # The first round pays for page faults and warm-up.
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def describe(args, case, batch, tokens, seconds, **more):
    row = dict(case=case, batch=batch, prompt=args.prompt, new=args.new)
    row |= dict(temperature=args.temperature, dtype=args.dtype)
    row |= dict(device=jax.devices()[0].device_kind, tokens_per_s=round(tokens / seconds))
    print(json.dumps(row | more), flush=True)


def against_transformers(args, batch):
    """Ratio over the faster of the two caches of generate."""
    from opsd_jax.pretrained.export import save_pretrained

    model, variables = load(args)
    with tempfile.TemporaryDirectory() as folder:
        if not args.no_torch:
            save_pretrained(folder, model.config, variables)
        theirs = {} if args.no_torch else torch_cases(args, batch, folder)
    compile_s, ours = our_case(args, batch, model, variables)
    medians = in_turns({"rollout": ours} | theirs, args.repeats)
    best = min((s for n, s in medians.items() if n != "rollout"), default=None)
    for name, seconds in medians.items():
        more = {}
        if name == "rollout":
            more = dict(compile_s=round(compile_s, 1))
            more |= dict(weights=args.weights) | logp_gap(args, model, variables, ours())
            more |= {} if best is None else dict(over_transformers=round(best / seconds, 2))
        describe(args, name, batch, batch * args.new, seconds, **more)


def refill(args, batch):
    """More completions than rows, lengths geometric: through slots, as batches that end with
    their longest row, and as batches that run to the limit."""
    model, variables = load(args)
    V, number = model.config.vocab_size, args.rounds * batch
    # Random weights give nearly uniform probabilities: 8 V / new ids stop with one in new / 8.
    stop_ids = tuple(range(1, 1 + round(8 * V / args.new)))
    config = RolloutConfig(
        args.new,
        temperature=args.temperature,
        stop_ids=stop_ids,
        unroll_layers=args.unroll_layers,
    )
    keys = jax.random.split(jax.random.key(0), number)
    asked = np.repeat(prompts(args, number // args.samples, V), args.samples, axis=0)
    jitted = jax.jit(functools.partial(rollout, model, config=config))
    lengths = jnp.full((batch,), args.prompt, jnp.int32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    sampler = Sampler(model, 0, mesh, FULLY_SHARDED, batch)
    tokens = {}

    def plain():
        total = 0
        for at in range(0, number, batch):
            rows = slice(at, at + batch)
            total += int(jitted(variables, asked[rows], lengths, keys[rows]).mask.sum())
        tokens["plain"] = total

    endless = functools.partial(rollout, model, config=dataclasses.replace(config, stop_ids=()))
    to_the_limit = jax.jit(endless)

    def full():
        for at in range(0, number, batch):
            rows = slice(at, at + batch)
            jax.block_until_ready(to_the_limit(variables, asked[rows], lengths, keys[rows]))
        tokens["full"] = tokens["plain"]  # What stands behind a stop token is of no use.

    def slots():
        found = sampler(variables, asked.tolist(), config, keys)
        tokens["refill"] = sum(len(one.ids) for one in found)

    medians = in_turns({"plain": plain, "full": full, "refill": slots}, args.repeats)
    rates = {name: tokens[name] / seconds for name, seconds in medians.items()}
    for name, seconds in medians.items():
        more = dict(mean_length=round(tokens[name] / number, 1), completions=number)
        more |= dict(samples=args.samples)
        if name == "refill":
            for other in ("plain", "full"):
                more[f"over_{other}"] = round(rates["refill"] / rates[other], 2)
        describe(args, name, batch, tokens[name], seconds, **more)


def floor(args, batch):
    """Share of the memory-bandwidth floor, and where the time of the profile goes."""
    model, variables = load(args)
    compile_s, ours = our_case(args, batch, model, variables)
    seconds = in_turns({"rollout": ours}, args.repeats)["rollout"]
    c = model.config
    per_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(args.dtype).itemsize
    cache = batch * per_token * (args.prompt + args.new / 2)
    least = args.new * (num_bytes(variables) + cache) / copy_bandwidth()
    more = dict(compile_s=round(compile_s, 1), share_of_floor=round(least / seconds, 3))
    more["largest_costs"] = largest_costs(ours)
    describe(args, "floor", batch, batch * args.new, seconds, **more)


def copy_bandwidth(megabytes=512):
    """Bytes per second read and written by x + 1 on a large array."""
    x = jnp.zeros(megabytes * 2**18, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    seconds = in_turns({"copy": lambda: jax.block_until_ready(add(x))}, 5)["copy"]
    return 2 * x.nbytes / seconds


def largest_costs(run, number=3):
    """Kinds of operations by their share of the time of all operations, from a profile."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(path).planes)
    total = collections.Counter()
    for plane in [p for p in planes if p.name.startswith("/device")] or planes:
        for event in (event for line in plane.lines for event in line.events):
            # Operations are named fusion.12, dot.3; loops and the host's own calls are not.
            kind, dot, number_of = event.name.rpartition(".")
            if dot and number_of.isdigit() and not kind.startswith(("while", "call")):
                total[kind] += event.duration_ns
    everything = max(sum(total.values()), 1)
    return {kind: round(t / everything, 2) for kind, t in total.most_common(number)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="8,32")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--model", help="a directory, or smollm2, instead of random weights")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--unroll_layers", type=int, default=4, help="as rollout.unroll_layers")
    parser.add_argument("--weights", choices=["int8"], help="as rollout.weights")
    parser.add_argument("--samples", type=int, default=1, help="--refill: of every prompt")
    parser.add_argument("--rounds", type=int, default=8, help="--refill: completions per row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--no_torch", action="store_true")
    parser.add_argument("--refill", action="store_true")
    parser.add_argument("--floor", action="store_true")
    args = parser.parse_args()
    measure = refill if args.refill else floor if args.floor else against_transformers
    for batch in map(int, args.batch.split(",")):
        measure(args, batch)


if __name__ == "__main__":
    main()
