# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: bit-exact round trips, sharded reads, merging, PEFT, bad input."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.pretrained.export import merge_lora, new_folder, save_adapter, save_pretrained
from opsd_jax.pretrained.load import SafetensorsDirectory, load_pretrained
from tests.representatives import representatives
from tests.small_disk import small_disk

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
FAMILY_VALUES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gemma2": {},
    "olmo2": {},
    "phi3": {},
}
LORA = LoraConfig(rank=3, alpha=12.0)


def model_config(family="llama", **changes):
    raw = {"model_type": family, **SHAPE, **FAMILY_VALUES[family]}
    if family in ("qwen3_moe", "phi3", "llama"):
        raw["tie_word_embeddings"] = False
    return dataclasses.replace(config_from_hf(raw), **changes)


def variables_of(config, seed=0, dtype=jnp.float32):
    """Random everywhere, adapters too."""
    shapes = jax.eval_shape(lambda: init_variables(Decoder(config), jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape).astype(np.float32), dtype),
        nn.meta.unbox(shapes),
    )


def hidden_of(config, variables, **kwargs):
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 64, (2, 7)))
    positions = jnp.broadcast_to(jnp.arange(7), ids.shape)
    with jax.disable_jit():  # small shapes shared by all cases: less compilation
        hidden, _ = Decoder(config).apply(variables, ids, positions, **kwargs)
    return np.asarray(hidden)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_VALUES)
def test_round_trip_is_bit_exact(family, dtype, tmp_path):
    config = model_config(family, dtype=dtype)
    params = variables_of(config, dtype=jnp.dtype(dtype))["params"]
    save_pretrained(str(tmp_path / "a"), config, {"params": params})
    loaded = load_pretrained(str(tmp_path / "a"), dtype)
    assert loaded.config == config
    assert_same_bits(loaded.params, params)
    save_pretrained(str(tmp_path / "b"), loaded.config, {"params": loaded.params})
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert_same_bits(first, second)


def test_shards_and_their_index(tmp_path):
    config = model_config()
    params = variables_of(config)["params"]
    save_pretrained(str(tmp_path), config, {"params": params}, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    tensors = {name: load_file(tmp_path / name) for name in files}
    assert all(name in tensors[file] for name, file in index["weight_map"].items())
    total = sum(x.nbytes for shard in tensors.values() for x in shard.values())
    assert index["metadata"]["total_size"] == total
    assert_same_bits(load_pretrained(str(tmp_path)).params, params)


def test_an_export_is_never_mixed_with_other_files(tmp_path):
    """Nor does it replace any: the folder may be the base of the run or another model's."""
    config = model_config(lora=LORA)
    variables = variables_of(config)
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    save_pretrained(str(link), config, {"params": variables["params"]})  # empty: taken
    before = {path: path.read_bytes() for path in out.iterdir()}
    relative = os.path.relpath(out)
    for save in (save_pretrained, save_adapter):
        for name in (str(out), str(link), relative, str(out / "config.json")):
            with pytest.raises(UserError, match=f"--out={name}: "):
                save(name, config, variables_of(config, seed=1))
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(UserError, match="lies in the run's folder"):
        new_folder(str(tmp_path / "link" / "new"), apart_from=relative)
    assert new_folder(str(tmp_path / "new"), apart_from=relative) == tmp_path / "new"


def test_an_export_is_whole_or_is_not_there(tmp_path, monkeypatch):
    """Whatever ends it: a full disk, an error in the last shard, or the interrupt key."""
    config = model_config(lora=LORA)
    variables = variables_of(config)
    for save in (save_pretrained, save_adapter):
        with small_disk(2000), pytest.raises(UserError, match=f"cannot write {tmp_path}: File too"):
            save(str(tmp_path / "out"), config, variables)
        assert not list(tmp_path.iterdir())

    def interrupted(path, tensors):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("opsd_jax.pretrained.export._save_file", interrupted)
        for save in (save_pretrained, save_adapter):
            with pytest.raises(KeyboardInterrupt):
                save(str(tmp_path / "out"), config, variables)
            assert not list(tmp_path.iterdir())
    save_adapter(str(tmp_path / "out"), config, variables)
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path).st_mode | 0o055


@pytest.mark.parametrize("family", representatives(["llama", "qwen3_moe", "phi3"], "qwen3_moe"))
def test_each_device_reads_its_own_slices_only(family, tmp_path, monkeypatch):
    config = model_config(family)
    params = variables_of(config)["params"]
    save_pretrained(str(tmp_path), config, {"params": params})
    read = []
    original = SafetensorsDirectory.read

    def counting(self, name, index):
        values = original(self, name, index)
        read.append(values.size)
        return values

    monkeypatch.setattr(SafetensorsDirectory, "read", counting)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    loaded = load_pretrained(str(tmp_path), mesh=mesh)
    assert_same_bits(jax.tree.map(np.asarray, loaded.params), jax.tree.map(np.asarray, params))
    specs = {str(x.sharding.spec) for x in jax.tree.leaves(loaded.params)}
    assert any("data" in s and "model" in s for s in specs), specs
    # Norms are on every device, but read once; everything else is read once in all.
    assert sum(read) == sum(x.size for x in jax.tree.leaves(params))


PROCESS = """
import sys, jax
from jax.sharding import AxisType
from opsd_jax.pretrained.load import SafetensorsDirectory, load_pretrained
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
read, original = [], SafetensorsDirectory.read
def counting(self, name, index):
    values = original(self, name, index)
    read.append(values.size if values.ndim > 1 else 0)
    return values
SafetensorsDirectory.read = counting
mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
params = load_pretrained(sys.argv[1], mesh=mesh).params
squares = jax.jit(lambda p: sum((x * x).sum() for x in jax.tree.leaves(p)))(params)
print("RESULT", sum(read), float(squares))
"""


@pytest.mark.slow
def test_each_process_reads_half(tmp_path):
    config = model_config()
    params = variables_of(config)["params"]
    save_pretrained(str(tmp_path), config, {"params": params})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), address, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    results = [line.split()[1:] for out in outputs for line in out.splitlines() if "RESULT" in line]
    matrices = sum(
        x.size
        for p, x in jax.tree_util.tree_leaves_with_path(params)
        if "norm" not in jax.tree_util.keystr(p)
    )
    assert [int(size) for size, _ in results] == [matrices // 2] * 2
    want = sum(
        float((x.astype(np.float64) ** 2).sum()) for x in map(np.asarray, jax.tree.leaves(params))
    )
    np.testing.assert_allclose([float(total) for _, total in results], want, rtol=1e-5)


@pytest.mark.parametrize(
    "family, rank_stabilized",
    representatives(
        itertools.product(["llama", "gemma2", "qwen3_moe", "olmo2"], [False, True]),
        ("llama", True),
        ("qwen3_moe", False),
    ),
)
def test_merged_weights_compute_the_same(family, rank_stabilized):
    lora = dataclasses.replace(LORA, rank_stabilized=rank_stabilized, targets=("[qkvo]_proj",))
    if family != "qwen3_moe":
        lora = dataclasses.replace(lora, targets=("*_proj",))
    config = model_config(family, lora=lora)
    variables = variables_of(config)
    with_adapters = hidden_of(config, variables)
    merged = {"params": merge_lora(config, variables)}
    np.testing.assert_allclose(hidden_of(config, merged), with_adapters, atol=2e-5)
    base = hidden_of(config, {"params": variables["params"]})
    assert np.abs(base - with_adapters).max() > 1e-2


def test_adapters_change_nothing_at_the_start():
    config = model_config(lora=LORA)
    variables = nn.meta.unbox(init_variables(Decoder(config), jax.random.key(0)))
    assert "gate_proj" in variables["lora"]["layers"]["mlp"]
    base = hidden_of(config, {"params": variables["params"]})
    np.testing.assert_array_equal(hidden_of(config, variables), base)


def test_dropout_needs_a_key_and_keeps_the_mean():
    config = model_config(lora=dataclasses.replace(LORA, dropout=0.5))
    variables = variables_of(config)
    plain = hidden_of(config, variables)
    np.testing.assert_array_equal(
        plain, hidden_of(dataclasses.replace(config, lora=LORA), variables)
    )
    one, two = (hidden_of(config, variables, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(one - two).max() > 1e-2
    again = hidden_of(config, variables, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(one, again)


def test_targets_by_pattern_and_by_name():
    config = model_config(lora=LoraConfig(2, 2.0, targets=("[qv]_proj", "down_proj")))
    lora = variables_of(config)["lora"]["layers"]
    assert set(lora["attention"]) == {"q_proj", "v_proj"} and set(lora["mlp"]) == {"down_proj"}
    with pytest.raises(UserError, match="embed_tokens"):
        LoraConfig(2, 2.0, targets=("embed_tokens",))


def test_experts_carry_no_adapters():
    with pytest.warns(UserWarning, match="experts of this model carry no adapters"):
        config = model_config("qwen3_moe", lora=LORA)
    assert set(variables_of(config)["lora"]["layers"]) == {"attention"}
    with pytest.raises(UserError, match="names only expert projections"):
        model_config("qwen3_moe", lora=LoraConfig(2, 2.0, targets=("gate_proj",)))


def odd_tokenizer(pad_id, eos_id, bos_id):
    """Words w0 ... w63; ids may lie beyond the 64 rows of the embedding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    names = {"bos_token": bos_id, "eos_token": eos_id}
    inner = PreTrainedTokenizerFast(
        tokenizer_object=core, **{k: f"w{i}" for k, i in names.items() if i is not None}
    )
    return HFTokenizer(inner, (), pad_id)


def oddities(family):
    """(pad id, end id, start id, stop ids of the run, their exported forms) from a fixed seed."""
    rng = np.random.default_rng(sorted(FAMILY_VALUES).index(family))
    pad = [63, 64, 151_643, -1, None][rng.integers(5)]
    eos, bos = ([None, 5][rng.integers(2)] for _ in range(2))
    stops = [(), (7,), (7, 9), (64,), (7, 151_645)][rng.integers(5)]
    return pad, eos, bos, stops


@pytest.mark.parametrize("family", representatives(FAMILY_VALUES, "qwen3", "qwen3_moe"))
def test_exports_load_elsewhere_and_compute_the_same(family, tmp_path, monkeypatch):
    """Whatever the ids of the tokenizer and the run: transformers and PEFT give our logits."""
    torch = pytest.importorskip("torch", reason="torch (test extra) is not installed")
    peft = pytest.importorskip("peft", reason="peft (test extra) is not installed")
    from transformers import AutoModelForCausalLM, GenerationConfig

    targets = ("q_proj", "o_proj") if "moe" in family else ("q_proj", "o_proj", "down_proj")
    lora = LoraConfig(3, 6.0, targets=targets, rank_stabilized=family < "o")
    config = model_config(family, lora=lora)
    variables = variables_of(config)
    pad, eos, bos, stops = oddities(family)
    tokenizer = odd_tokenizer(pad, eos, bos)
    monkeypatch.chdir(tmp_path)
    save_pretrained("merged", config, variables, tokenizer, stop_ids=stops)
    ids = np.random.default_rng(3).integers(0, 64, (2, 7))

    def theirs(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(ids)).logits.numpy()

    hidden = jnp.asarray(hidden_of(config, variables))
    ours = head_logits(output_head(variables["params"], config), hidden)
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    np.testing.assert_allclose(ours, theirs(merged), atol=2e-5)
    found = GenerationConfig.from_pretrained("merged")
    wanted = [i for i in ((eos,) if eos is not None else ()) + stops if i < 64]
    assert found.eos_token_id in (wanted, *wanted, None) and bool(wanted) == bool(
        found.eos_token_id
    )
    assert found.pad_token_id in range(64) or found.pad_token_id is None

    if family == "phi3":  # one matrix for q, k, v
        return
    save_pretrained("base", config, {"params": variables["params"]}, tokenizer)
    save_adapter("adapter", config, variables, base="base")
    monkeypatch.chdir("/")  # where a relative path would be another one
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        str(tmp_path / "adapter"), dtype=torch.float32
    )
    np.testing.assert_allclose(ours, theirs(model), atol=2e-5)


def test_an_adapter_names_the_commit_of_its_base(tmp_path):
    config = model_config(lora=LORA)
    commit = "0" * 40
    for base, wanted in (
        (f"me/tiny@{commit}", ("me/tiny", commit)),
        ("me/tiny", ("me/tiny", None)),
        ("", (None, None)),
    ):
        out = tmp_path / f"out{len(base)}"
        save_adapter(str(out), config, variables_of(config), base=base)
        found = json.loads((out / "adapter_config.json").read_text())
        assert (found["base_model_name_or_path"], found["revision"]) == wanted


def test_peft_needs_adapters_and_separate_projections(tmp_path):
    config = model_config()
    with pytest.raises(UserError, match="no adapters"):
        save_adapter(str(tmp_path), config, variables_of(config))
    config = model_config("phi3", lora=LORA)
    with pytest.raises(UserError, match="one matrix"):
        save_adapter(str(tmp_path), config, variables_of(config))


@pytest.fixture
def saved(tmp_path):
    config = model_config()
    params = variables_of(config)["params"]
    save_pretrained(str(tmp_path), config, {"params": params}, max_shard_bytes=20_000)
    return tmp_path


def edit(directory, change):
    """Applies `change` to the tensors of the first shard, and keeps the index in step."""
    first = sorted(f for f in os.listdir(directory) if f.startswith("model-"))[0]
    tensors = change(load_file(directory / first))
    save_file(tensors, directory / first)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    kept = {n: f for n, f in index["weight_map"].items() if f != first}
    index["weight_map"] = kept | dict.fromkeys(tensors, first)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_missing_shard_is_named(saved):
    (saved / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    victim = sorted(f for f in os.listdir(saved) if f.startswith("model-"))[-1]
    (saved / victim).unlink()
    with pytest.raises(UserError, match="missing shard"):
        load_pretrained(str(saved))


@pytest.mark.parametrize("keep", [4, 200, -100])
def test_a_truncated_file_is_named(saved, keep):
    victim = sorted(saved.glob("model-*"))[1]
    data = victim.read_bytes()
    victim.write_bytes(data[:keep])
    with pytest.raises(UserError, match=f"{victim.name}: truncated"):
        load_pretrained(str(saved))


def test_wrong_tensors_are_all_named(saved):
    def change(tensors):
        embed = tensors.pop("model.embed_tokens.weight")
        return tensors | {"model.token_table.weight": embed}

    edit(saved, change)
    with pytest.raises(UserError, match="missing model.embed_tokens.weight; unexpected model.tok"):
        load_pretrained(str(saved))


def test_a_wrong_shape_is_named(saved):
    edit(saved, lambda t: t | {"model.embed_tokens.weight": np.zeros((63, 32), np.float32)})
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(63, 32\), not \(64, 32\)"):
        load_pretrained(str(saved))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_nan_is_warned_about_by_name(saved, dtype):
    def change(tensors):
        w = tensors["model.embed_tokens.weight"].astype(dtype)
        w[5, 3], w[6, 3] = np.nan, -np.inf
        return tensors | {"model.embed_tokens.weight": w}

    edit(saved, change)
    with pytest.warns(UserWarning, match="NaN in model.embed_tokens.weight$"):
        load_pretrained(str(saved))


def test_infinity_is_not_nan(saved, recwarn):
    edit(saved, lambda t: t | {"model.embed_tokens.weight": np.full((64, 32), np.inf, "float32")})
    load_pretrained(str(saved))
    assert not [w for w in recwarn if "NaN" in str(w.message)]


def test_pickles_are_refused(saved):
    for file in saved.glob("model*"):
        file.unlink()
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="pickled weights .pytorch_model.bin.*never opened"):
        load_pretrained(str(saved))


def test_broken_json_is_named(saved):
    for name in ("model.safetensors.index.json", "config.json"):
        (saved / name).write_text("{,")
        with pytest.raises(UserError, match=f"{name}: not valid JSON"):
            load_pretrained(str(saved))


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match="no such model"):
        load_pretrained(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="config.json: no such file"):
        load_pretrained(str(tmp_path))


def test_a_tied_model_may_repeat_its_embedding_only(tmp_path):
    config = model_config("qwen2")
    params = variables_of(config)["params"]
    save_pretrained(str(tmp_path), config, {"params": params})
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, path)
    assert_same_bits(load_pretrained(str(tmp_path)).params, params)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        load_pretrained(str(tmp_path))
