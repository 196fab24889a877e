# SPDX-License-Identifier: Apache-2.0
"""Peak host memory of loading a checkpoint, as a multiple of its bytes.

    python experiments/benchmarks/load_memory.py [--gigabytes=1.2] [--dtype=bfloat16] [--devices=1]

Writes a synthetic Llama checkpoint of several shards tensor by tensor, loads it in a fresh
process and prints that process's peak resident memory, with and without what the imports
already held. On a CPU the loaded parameters are part of that memory, so 1.0 is the least.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

MEGABYTE = 2**20


def write_checkpoint(directory: str, gigabytes: float, dtype: str) -> int:
    """A random Llama of about that size; returns the bytes of its tensors."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    raw = dict(model_type="llama", vocab_size=32000, hidden_size=1024, intermediate_size=4096)
    raw |= dict(num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True)
    D, F, kv = 1024, 4096, 256
    layer = {
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
    }
    itemsize = jnp.dtype(dtype).itemsize
    embedding = 32000 * D * itemsize
    per_layer = sum(int(np.prod(shape)) for shape in layer.values()) * itemsize
    num_layers = max(1, round((gigabytes * 1e9 - embedding) / per_layer))
    raw["num_hidden_layers"] = num_layers
    rng = np.random.default_rng(0)

    def random(shape):
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(dtype)

    shards = {"model-00000.safetensors": {"model.embed_tokens.weight": (32000, D)}}
    shards["model-00000.safetensors"]["model.norm.weight"] = (D,)
    for i in range(num_layers):
        names = {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shards.setdefault(f"model-{i // 8 + 1:05}.safetensors", {}).update(names)
    weight_map, total = {}, 0
    for file_name, shapes in shards.items():
        tensors = {name: random(shape) for name, shape in shapes.items()}
        save_file(tensors, os.path.join(directory, file_name))
        weight_map |= dict.fromkeys(tensors, file_name)
        total += sum(x.nbytes for x in tensors.values())
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump(raw, file)
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as file:
        json.dump({"weight_map": weight_map}, file)
    return total


def load(directory: str, dtype: str) -> dict:
    """Runs in the fresh process."""
    import jax
    from jax.sharding import AxisType

    from opsd_jax.pretrained.load import load_pretrained

    count = jax.device_count()
    mesh = jax.make_mesh((count, 1), ("data", "model"), (AxisType.Auto,) * 2)
    before = peak_bytes()
    start = time.perf_counter()
    loaded = load_pretrained(directory, dtype, mesh if count > 1 else None)
    jax.block_until_ready(loaded.params)
    return {"before": before, "peak": peak_bytes(), "seconds": time.perf_counter() - start}


def peak_bytes() -> int:
    """Peak resident memory of this program (`ru_maxrss` would count the parent's as well)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as directory:
        size = write_checkpoint(directory, args.gigabytes, args.dtype)
        flags = f"--xla_force_host_platform_device_count={args.devices}"
        out = subprocess.run(
            [sys.executable, __file__, f"--load={directory}", f"--dtype={args.dtype}"],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
            text=True,
        )
    measured = json.loads(out.stdout.splitlines()[-1])
    growth = measured["peak"] - measured["before"]
    print(
        f"checkpoint {size / MEGABYTE:.0f} MiB ({args.dtype}, {args.devices} device(s)): peak "
        f"{measured['peak'] / MEGABYTE:.0f} MiB = {measured['peak'] / size:.2f} x checkpoint; "
        f"without the {measured['before'] / MEGABYTE:.0f} MiB held before loading "
        f"{growth / size:.2f} x; {measured['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
