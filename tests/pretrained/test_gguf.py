# SPDX-License-Identifier: Apache-2.0
"""GGUF files: small ones, written here with the `gguf` package."""

import struct

import gguf
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.pretrained.gguf_file import GGUFFile
from opsd_jax.pretrained.load import load_pretrained

D, F, V, N, K, H, L = 32, 64, 64, 4, 2, 8, 2


def llama_cpp_order(w: np.ndarray, heads: int) -> np.ndarray:
    """The row order that llama.cpp's converter gives q and k of Llama models."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def write_gguf(path, arch="llama", kinds=None, extra=(), seed=0, **fields):
    """A tiny file; returns its tensors under Hugging Face names, in Hugging Face row order."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(L)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    for key, value in fields.items():
        writer.add_uint32(key, value)
    tokens = [bytes([i]).decode("latin-1") if 33 <= i < 127 else f"<{i}>" for i in range(V)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i == 0 else 1 for i in range(V)])
    writer.add_token_merges([])
    writer.add_eos_token_id(0)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for i in range(L):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (D,),
            f"blk.{i}.ffn_norm.weight": (D,),
            f"blk.{i}.attn_q.weight": (N * H, D),
            f"blk.{i}.attn_k.weight": (K * H, D),
            f"blk.{i}.attn_v.weight": (K * H, D),
            f"blk.{i}.attn_output.weight": (D, N * H),
            f"blk.{i}.ffn_gate.weight": (F, D),
            f"blk.{i}.ffn_up.weight": (F, D),
            f"blk.{i}.ffn_down.weight": (D, F),
        }
    written = {}
    for name, shape in {**shapes, **dict(extra)}.items():
        w = rng.normal(0, 0.3, shape).astype(np.float32)
        written[name] = w
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            w = llama_cpp_order(w, N if "attn_q" in name else K)
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, w)
        else:
            writer.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def test_header_agrees_with_the_gguf_package(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    ours = GGUFFile(str(tmp_path / "m.gguf"))
    theirs = gguf.GGUFReader(str(tmp_path / "m.gguf"))
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours._metadata[key] == field.contents()
    assert len(ours.shapes) == len(theirs.tensors)


def test_queries_and_keys_are_put_back_in_halves(tmp_path):
    written = write_gguf(tmp_path / "m.gguf")
    file = GGUFFile(str(tmp_path / "m.gguf"))
    for ours, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v")):
        name = f"model.layers.1.self_attn.{ours}.weight"
        rows, width = file.shapes[name]
        whole = file.read(name, (slice(0, rows), slice(0, width)))
        np.testing.assert_array_equal(whole, written[f"blk.1.{theirs}.weight"])
        part = file.read(name, (slice(3, 13), slice(5, 9)))  # cuts through two heads
        np.testing.assert_array_equal(part, whole[3:13, 5:9])


def test_qwen3_is_not_permuted(tmp_path):
    norms = {f"blk.{i}.attn_{x}_norm.weight": (H,) for i in range(L) for x in "qk"}
    written = write_gguf(tmp_path / "m.gguf", "qwen3", extra=norms)
    loaded = load_pretrained(str(tmp_path / "m.gguf"))
    assert loaded.config.qk_norm and loaded.config.family == "qwen3"
    kernel = np.asarray(loaded.params["layers"]["attention"]["q_proj"]["kernel"])[0]
    np.testing.assert_array_equal(kernel.reshape(D, -1).T, written["blk.0.attn_q.weight"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_rows_are_expanded(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    name = "blk.0.ffn_down.weight"
    written = write_gguf(tmp_path / "m.gguf", kinds={name: kind})
    file = GGUFFile(str(tmp_path / "m.gguf"))
    got = file.read("model.layers.0.mlp.down_proj.weight", (slice(8, 24), slice(0, F)))
    want = gguf.dequantize(gguf.quantize(written[name], kind), kind)
    np.testing.assert_array_equal(got, want[8:24])


def test_llama3_rope_divisors_become_the_scaling(tmp_path):
    from opsd_jax.model.rope import RopeScaling, rope_frequencies

    scaling = RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    divisors = rope_frequencies(H, 1e4)[0] / rope_frequencies(H, 1e4, scaling)[0]
    write_gguf(tmp_path / "m.gguf")
    file = GGUFFile(str(tmp_path / "m.gguf"))
    assert file._config(divisors)["rope_scaling"]["factor"] == 32.0
    with pytest.raises(UserError, match="rope_freqs"):
        file._config(divisors * 1.5)


def tokenizer_of(path, template=None, add_bos=False):
    """Of a file whose vocabulary is single letters, <bos>, <end> and, user-defined, <think>."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(D)
    writer.add_head_count(N)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*"<>abcdefghijklmnopqrstuvwxyz/", "<bos>", "<end>", "<think>"])
    writer.add_token_types([1] * 29 + [3, 3, 4])
    writer.add_token_merges([])
    writer.add_bos_token_id(29)
    writer.add_eos_token_id(30)
    writer.add_add_bos_token(add_bos)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(str(path)).tokenizer()


def test_a_user_defined_token_is_one_id_and_is_shown(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m.gguf")
    assert tokenizer.encode("a<think>b") == [2, 31, 3]
    assert tokenizer.decode([2, 31, 3, 30]) == "a<think>b"


@pytest.mark.filterwarnings("ignore:this tokenizer has no chat template")
def test_there_is_one_bos_where_the_file_wants_one(tmp_path):
    for add_bos in (False, True):
        plain = tokenizer_of(tmp_path / "m.gguf", add_bos=add_bos)
        assert plain.render("a").count(29) == add_bos and plain.encode("a") == [2]
        chat = tokenizer_of(
            tmp_path / "m.gguf", "{{ '<bos>' + messages[0]['content'] }}", add_bos=add_bos
        )
        assert chat.render("a") == [29, 2]


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for cut, message in ((100, "truncated"), (len(whole) - 64, "truncated")):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"m.gguf: {message}"):
            load_pretrained(str(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not a GGUF"):
        load_pretrained(str(path))
    write_gguf(path, "mamba")
    with pytest.raises(UserError, match="mamba"):
        load_pretrained(str(path))


@pytest.mark.parametrize(
    "value, message",
    [
        (struct.pack("<II", 4, 0), "general.alignment must be a whole number >= 1, not 0"),
        (struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, "general.alignment has arrays"),
    ],
)
def test_a_header_made_to_break_its_reader_is_named(value, message, tmp_path):
    key = b"general.alignment"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    (tmp_path / "m.gguf").write_bytes(head + value)
    with pytest.raises(UserError, match=f"m.gguf: .*{message}"):
        GGUFFile(str(tmp_path / "m.gguf"))


def test_unsupported_quantisation_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, kinds={"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0})
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    assert data[at : at + 4] == (8).to_bytes(4, "little")
    path.write_bytes(data[:at] + (9).to_bytes(4, "little") + data[at + 4 :])  # 9 = Q8_1
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight has an unsupported quantisation"):
        load_pretrained(str(path))
