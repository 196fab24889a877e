# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the rollout, against transformers' `generate` with the same weights.

    python experiments/benchmarks/rollout.py [--batch=8,32] [--prompt=64] [--new=128]
        [--model=DIR] [--temperature=1] [--repeats=5] [--no_torch] [--refill]

Prints one JSON line per case; compile time is excluded and stated. Without --model the weights
are random, in the shape of a small Qwen3 (hidden 256, 4 layers, 8 heads / 4 kv, V 4,096,
float32). All cases of a batch size are timed in turns and the medians compared, so that a busy
machine slows all of them alike. With --refill: completions of uneven lengths (geometric, mean
1/8 of --new), through slots with refill and as plain batches.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import opsd_jax
from opsd_jax.rollouts import RolloutConfig, rollout

SMALL_QWEN3 = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    vocab_size=4096,
    tie_word_embeddings=True,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)


def random_model(folder):
    """Writes a random Qwen3 as a Hugging Face directory."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SMALL_QWEN3)).float().save_pretrained(folder)
    return folder


def our_case(args, batch):
    """(seconds to compile, function to time) of one jitted rollout."""
    model, variables = opsd_jax.load_model(args.model)
    config = RolloutConfig(args.new, temperature=args.temperature)
    ids = jnp.asarray(prompts(args, batch, model.config.vocab_size))
    lengths = jnp.full((batch,), args.prompt, jnp.int32)
    start = time.perf_counter()
    jitted = jax.jit(functools.partial(rollout, model, config=config))
    run = jitted.lower(variables, ids, lengths, jax.random.key(0)).compile()
    seconds = time.perf_counter() - start
    return seconds, lambda: jax.block_until_ready(run(variables, ids, lengths, jax.random.key(0)))


def torch_cases(args, batch):
    """Name -> function to time of transformers' generate with dynamic and static cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
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


def prompts(args, batch, vocab_size):
    return np.random.default_rng(0).integers(1, vocab_size, (batch, args.prompt)).astype(np.int32)


def in_turns(cases, repeats):
    """Name -> median seconds; one round of every case after the other."""
    times = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if repeat > 0:  # the first round pays for page faults and warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="8,32")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--model")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_torch", action="store_true")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or random_model(folder)
        for batch in map(int, args.batch.split(",")):
            compile_s, ours = our_case(args, batch)
            cases = {"rollout": ours} | ({} if args.no_torch else torch_cases(args, batch))
            medians = in_turns(cases, args.repeats)
            tokens = batch * args.new
            best = min((s for n, s in medians.items() if n != "rollout"), default=None)
            for name, seconds in medians.items():
                row = dict(case=name, batch=batch, prompt=args.prompt, new=args.new)
                row |= dict(temperature=args.temperature, device=jax.devices()[0].device_kind)
                row |= dict(tokens_per_s=round(tokens / seconds))
                if name == "rollout":
                    row |= dict(compile_s=round(compile_s, 1))
                    row |= {} if best is None else dict(over_transformers=round(best / seconds, 2))
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
