# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler takes the whole step with every kernel; it needs `libtpu` and no TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the tpu extra is not installed")
def test_the_step_compiles_for_a_slice_with_all_kernels(tmp_path):
    config = dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        head_dim=64,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_hidden_layers=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        vocab_size=4096,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        ROOT / "experiments/benchmarks/tpu_compile.py",
        f"--gin_file={ROOT / 'experiments/paper/qwen3_1p7b.gin'}",
        f"--model_config={tmp_path / 'config.json'}",
        "--topology=v5e:2x2",
    ]
    for binding in (
        "train.attention = 'splash'",
        "rollout.attention = 'pallas'",
        "mesh.model = 2",
    ):
        command.append(f"--gin_bindings={binding}")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chips"] == 4 and 0 < found["temporaries_gib"] < 1
