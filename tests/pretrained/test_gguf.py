# SPDX-License-Identifier: Apache-2.0
"""GGUF files written here with the `gguf` package, right ones and every kind of wrong one."""

import functools
import math
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.pretrained.gguf_file import GGUFFile
from opsd_jax.pretrained.interface import forward
from opsd_jax.pretrained.load import load_pretrained

D, F, N, K, H, L = 32, 64, 4, 2, 8, 2
TEXT = "the cat and the hat that sat, then 12 cats; don't they THINK? naïve 你好\n\n  the end"
SPECIAL = {"<bos>": 3, "<end>": 3, "<think>": 4}


@functools.cache
def trained_bpe():
    """A byte-level BPE of the `tokenizers` package with the split of Qwen2: what tokens must be."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=285, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([TEXT] * 4, trainer)
    core.add_tokens([AddedToken(t, normalized=False, special=k == 3) for t, k in SPECIAL.items()])
    return core


@functools.cache
def vocabulary():
    """(tokens, types, merges) of `trained_bpe` as a GGUF file has them."""
    import json

    ids = trained_bpe().get_vocab()
    tokens = sorted(ids, key=ids.get)
    merges = [" ".join(pair) for pair in json.loads(trained_bpe().to_str())["model"]["merges"]]
    return tokens, [SPECIAL.get(token, 1) for token in tokens], merges


V = len(vocabulary()[0])


def fields_of(arch="llama", **changes):
    """The metadata of a tiny file; {key: value}, with None for a key that is left out."""
    tokens, types, merges = vocabulary()
    fields = {
        "general.type": "model",
        f"{arch}.block_count": L,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": D,
        f"{arch}.feed_forward_length": F,
        f"{arch}.attention.head_count": N,
        f"{arch}.attention.head_count_kv": K,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<bos>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<end>"),
    }
    return {k: v for k, v in (fields | changes).items() if v is not None}


def tensors_of(arch="llama", head=H, extra=(), seed=0):
    """Random tensors under their GGUF names, in Hugging Face row order."""
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for i in range(L):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (D,),
            f"blk.{i}.ffn_norm.weight": (D,),
            f"blk.{i}.attn_q.weight": (N * head, D),
            f"blk.{i}.attn_k.weight": (K * head, D),
            f"blk.{i}.attn_v.weight": (K * head, D),
            f"blk.{i}.attn_output.weight": (D, N * head),
            f"blk.{i}.ffn_gate.weight": (F, D),
            f"blk.{i}.ffn_up.weight": (F, D),
            f"blk.{i}.ffn_down.weight": (D, F),
        }
        if arch == "qwen3":
            shapes |= {f"blk.{i}.attn_{x}_norm.weight": (head,) for x in "qk"}
        if arch == "qwen2":
            rows = {"q": N, "k": K, "v": K}
            shapes |= {f"blk.{i}.attn_{x}.bias": (n * head,) for x, n in rows.items()}
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in {**shapes, **dict(extra)}.items()
    }


def llama_cpp_order(w: np.ndarray, heads: int) -> np.ndarray:
    """The row order that llama.cpp's converter gives q and k of Llama models."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def value_type(value):
    """The GGUF type that holds a Python value."""
    types = gguf.GGUFValueType
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            return types.INT64
        return types.UINT32 if value < 2**32 else types.UINT64
    return types.get_type(value)


def write_gguf(path, arch="llama", fields=None, tensors=None, kinds=None):
    """Writes a file with the `gguf` package; returns its tensors in Hugging Face row order."""
    fields = fields_of(arch) if fields is None else fields
    tensors = tensors_of(arch) if tensors is None else tensors
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in fields.items():
        entries = value_type(value[0]) if isinstance(value, list) and value else None
        writer.add_key_value(key, value, value_type(value), entries)
    for name, w in tensors.items():
        kind = (kinds or {}).get(name)
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            w = llama_cpp_order(w, N if "attn_q" in name else K)
        writer.add_tensor(name, w if kind is None else gguf.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


class Rewriter:
    """Other metadata before the tensors of a valid file, a thousand times faster."""

    def __init__(self, path):
        write_gguf(path)
        reader = gguf.GGUFReader(str(path))
        fields = [reader.fields["tokenizer.ggml.bos_token_id"], *(t.field for t in reader.tensors)]
        ends = [field.offset + sum(part.nbytes for part in field.parts) for field in fields]
        whole = path.read_bytes()
        start = min(tensor.field.offset for tensor in reader.tensors)
        self.path, self.data = path, whole[reader.data_offset :]
        self.table, self.num_tensors = whole[start : max(ends)], len(reader.tensors)
        self.pack = functools.cache(self._pack)

    def _pack(self, key, value):
        value = list(value) if isinstance(value, tuple) else value
        head = struct.pack("<Q", len(key)) + key.encode()
        if value == []:
            return head + struct.pack("<IIQ", 9, 4, 0)
        entries = value_type(value[0]) if isinstance(value, list) else None
        writer = gguf.GGUFWriter("", "")
        return head + writer._pack_val(value, value_type(value), True, entries)

    def __call__(self, fields, arch="llama"):
        frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        frozen = {"general.architecture": arch} | frozen
        head = b"GGUF" + struct.pack("<IQQ", 3, self.num_tensors, len(frozen))
        head += b"".join(self.pack(key, value) for key, value in frozen.items()) + self.table
        self.path.write_bytes(head + bytes(-len(head) % 32) + self.data)


def refusal(path):
    """What a load says in one line; None where it loads."""
    try:
        load_pretrained(str(path))
    except UserError as error:
        text = str(error)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 600
        return text
    return None


def test_header_agrees_with_the_gguf_package(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    ours = GGUFFile(str(tmp_path / "m.gguf"))
    theirs = gguf.GGUFReader(str(tmp_path / "m.gguf"))
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours._metadata.fields[key] == field.contents()
    assert len(ours.shapes) == len(theirs.tensors)


@pytest.mark.parametrize("arch, head", [("llama", H), ("llama", 12), ("qwen2", H), ("qwen3", 128)])
def test_logits_equal_those_of_transformers(arch, head, tmp_path):
    """Also with another base and epsilon, the two numbers that a file may choose freely."""
    torch = pytest.importorskip("torch", reason="torch (test extra) is not installed")
    from transformers import AutoModelForCausalLM

    changes = {
        f"{arch}.rope.freq_base": 37.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 0.3,
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.rope.dimension_count": head,
    }
    write_gguf(tmp_path / "m.gguf", arch, fields_of(arch, **changes), tensors_of(arch, head))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = np.random.default_rng(1).integers(0, V, (2, 24))
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(ids)).logits.numpy()
    loaded = load_pretrained(str(tmp_path / "m.gguf"))
    got = forward(loaded.model, {"params": loaded.params}, jnp.asarray(ids))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_tokens_equal_those_of_the_trained_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    ours = GGUFFile(str(tmp_path / "m.gguf")).tokenizer()
    want = trained_bpe().encode("<think>" + TEXT + "<end>").ids
    assert ours.encode("<think>" + TEXT + "<end>") == want and len(want) < len(TEXT)
    assert ours.decode(want) == "<think>" + TEXT
    assert ours.stop_ids == (trained_bpe().token_to_id("<end>"),)


# Keys of `gguf.constants.Keys` that change neither ids nor logits here. The rest of them must be
# refused: silence about one of these would be a silent wrong number.
HARMLESS = {
    "general": "all but architecture, type, alignment and the version of the blocks",
    "imatrix": "how numbers were rounded",
    "split.tensors.count": "",
    "{arch}.pooling_type": "of the vector of a text",
    "{arch}.rope.scaling.original_context_length": "read with yarn and longrope",
    "{arch}.rope.scaling.finetuned": "never read",
    "tokenizer.ggml.token_type_count": "of encoders",
    "tokenizer.ggml.scores": "of unigram models",
    "tokenizer.ggml.unknown_token_id": "every byte is known",
    "tokenizer.ggml.seperator_token_id": "of encoders",
    "tokenizer.ggml.mask_token_id": "of encoders",
    "tokenizer.ggml.add_eos_token": "a prompt does not end",
    "tokenizer.huggingface.json": "a copy",
    "tokenizer.chat_template.{name}": "another than the default",
    "tokenizer.chat_templates": "their names",
    **{
        f"tokenizer.ggml.{name}_token_id": "for filling in"
        for name in "fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep prefix suffix middle".split()
    },
}
# Read, so that a wrong value is refused by its own name or taken.
EXACT = set(
    "vocab_size context_length embedding_length block_count feed_forward_length "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base".split()
)
READ_ELSEWHERE = set(
    "general.architecture general.alignment tokenizer.ggml.model tokenizer.ggml.pre "
    "tokenizer.ggml.tokens tokenizer.ggml.token_type tokenizer.ggml.merges "
    "tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id "
    "tokenizer.ggml.eom_token_id tokenizer.ggml.padding_token_id tokenizer.ggml.add_bos_token "
    "tokenizer.chat_template".split()
)


def keys_of_llama_cpp(group=None):
    for value in vars(group or gguf.constants.Keys).values():
        if isinstance(value, type):
            yield from keys_of_llama_cpp(value)
        elif isinstance(value, str) and "." in value and value != gguf.constants.Keys.__module__:
            yield value


def is_harmless(key):
    if key in ("general.type", "general.quantization_version"):
        return False
    return key in HARMLESS or key.split(".")[0] in HARMLESS


def test_every_key_of_llama_cpp_is_exact_harmless_or_refused_by_name(tmp_path):
    known = {key for key in keys_of_llama_cpp() if not key.startswith("__")}
    assert len(known) > 200
    # Names that llama.cpp reads or others write and the package does not list.
    known |= {
        "{arch}.rope.scale_linear",
        "{arch}.attention.made_up",
        "made.up",
        "gemma2.block_count",
    }
    write, valid = Rewriter(tmp_path / "m.gguf"), fields_of()
    for general in sorted(known - READ_ELSEWHERE):
        key = general.replace("{arch}", "llama").replace("{id}", "0").replace("{dense}", "dense")
        key = key.replace("{name}", "tool_use")
        if key.removeprefix("llama.") in EXACT:
            continue
        for value in (3, 0.5, "text"):
            write(valid | {key: value})
            try:
                GGUFFile(str(write.path))
            except UserError as error:
                assert not is_harmless(general), key
                assert key in str(error)
            else:
                assert is_harmless(general), (key, value)


NEUTRAL = {
    "general.quantization_version": 2,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.expert_count": 0,
    "llama.attention.causal": True,
    "llama.use_parallel_residual": False,
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.logit_scale": 1.0,
    "tokenizer.ggml.add_space_prefix": False,
    "split.count": 1,
    "mradermacher.quantized_by": "somebody",
}


def test_values_that_ask_for_nothing_are_taken(tmp_path):
    write_gguf(tmp_path / "m.gguf", fields=fields_of(**NEUTRAL))
    assert refusal(tmp_path / "m.gguf") is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"llama.rope.scaling.factor": 4.0}, "rope.scaling.factor must be 0 or 1, not 4.0"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type must be 'none', not 'yarn'"),
        ({"llama.use_parallel_residual": 0}, "use_parallel_residual must be False, not 0"),
        ({"split.count": 3}, "one part of a split file"),
        ({"general.type": "adapter"}, "general.type must be 'model'"),
        (
            {"llama.attention.head_count": [N, N]},
            r"head_count must be a whole number.*not \[4, 4\]",
        ),
        ({"llama.attention.head_count": 2}, "head_count_kv does not fit"),
        ({"llama.block_count": 10_000_000}, "block_count does not fit"),
        ({"llama.block_count": None}, "llama.block_count is missing; it must be a whole number"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count does not fit"),
        ({"llama.rope.freq_base": math.nan}, "freq_base must be a positive number, not nan"),
        ({"llama.vocab_size": V + 1}, "vocab_size does not fit"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.tokens": ["a"] * V}, "tokens must be a list of texts that are all diff"),
        ({"tokenizer.ggml.token_type": None}, "token_type is missing"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type must be a list of .* one for each tok"),
        ({"tokenizer.ggml.merges": None}, "merges is missing; it must be the pairs that make"),
        ({"tokenizer.ggml.merges": vocabulary()[2][:9]}, "merges must be the pairs that make"),
        ({"tokenizer.ggml.merges": [*vocabulary()[2], "Z 你"]}, "tokens and merges do not fit"),
        (
            {"tokenizer.ggml.eos_token_id": V},
            f"eos_token_id must be an id of .*, from 0 to {V - 1}",
        ),
        ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id must be an id"),
        ({"tokenizer.ggml.padding_token_id": 2**40}, "padding_token_id must be an id"),
        ({"tokenizer.chat_template": 3}, "chat_template must be text, not 3"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token must be true or false, not 1"),
    ],
)
def test_a_wrong_value_is_named(changes, message, tmp_path):
    write_gguf(tmp_path / "m.gguf", fields=fields_of(**changes))
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path / "m.gguf"))


VALUES = (
    None, 0, 1, 3, 7, -1, 2**31, 2**32 - 1, 2**63, 0.0, 0.5, -2.5, math.nan, math.inf, 3e38, True,
    False, "", "none", "text", "x" * 5000, [], [0], [1, 2], [2**40], ["a", "b"], [0.5], [True],
)  # fmt: skip
FREE = {"rope_theta", "rms_norm_eps", "max_position_embeddings", "eos_token_id"}
OPTIONAL = {
    "llama.vocab_size": V,
    "llama.rope.dimension_count": H,
    "llama.attention.key_length": H,
    "llama.attention.value_length": H,
    "general.alignment": 32,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.eot_token_id": 1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def computed(path):
    """All that decides logits and tokens, but for the numbers that a file may choose."""
    file = GGUFFile(str(path))
    config = {key: value for key, value in file.config.items() if key not in FREE}
    weights = {n: file.read(n, (slice(None),) * len(s)).tobytes() for n, s in file.shapes.items()}
    return config, weights, file.tokenizer().encode(TEXT)


def test_any_value_of_any_key_computes_the_same_or_is_refused(tmp_path):
    """The mutation test of the metadata: every key of a valid file times every kind of value."""
    write, valid = Rewriter(tmp_path / "m.gguf"), fields_of(**OPTIONAL)
    write(valid)
    want, taken = computed(write.path), []
    for key in valid:
        for value in VALUES:
            write({k: v for k, v in (valid | {key: value}).items() if v is not None})
            try:
                assert computed(write.path) == want, (key, value)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
                continue
            taken.append((key, value))
    assert ("llama.rope.freq_base", 0.5) in taken and ("llama.vocab_size", None) in taken
    assert len(valid) < len(taken) < len(valid) * len(VALUES) / 4


def test_damaged_bytes_of_the_header_end_in_a_line(tmp_path):
    """200 headers with some bytes changed, from one seed; sizes may become anything."""
    path = tmp_path / "m.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    table = whole.index(b"blk.1.ffn_down.weight") + 64
    front = whole.index(b"tokenizer.ggml.tokens")
    rng, refused = np.random.default_rng(0), 0
    for case in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, front, 2) if case % 2 else rng.integers(table - 1200, table, 2):
            data[at] = rng.choice([0, 1, 9, 127, 255, int(rng.integers(256))])
        path.write_bytes(data)
        try:
            file = GGUFFile(str(path))
            file.tokenizer()
        except UserError as error:
            refused += "\n" not in str(error)
            continue
        refused += bytes(data) == whole or file.config["vocab_size"] == V
    assert refused == 200


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

    path, tensors = tmp_path / "m.gguf", tensors_of()
    scaling = RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    divisors = rope_frequencies(H, 1e4)[0] / rope_frequencies(H, 1e4, scaling)[0]
    # Without a base in the file, 10,000 is meant.
    fields = fields_of(**{"llama.rope.freq_base": None})
    write_gguf(path, fields=fields, tensors=tensors | {"rope_freqs.weight": divisors})
    assert GGUFFile(str(path)).config["rope_scaling"]["factor"] == 32.0
    slowest = divisors * np.array([1, 1, 1, 1.01], np.float32)
    for wrong in (divisors * 1.5, slowest, divisors[:2]):
        wrong = wrong.astype(np.float32)
        write_gguf(path, tensors=tensors | {"rope_freqs.weight": wrong})
        assert "rope_freqs.weight is none of the llama3 scalings" in refusal(path)
    # llama.cpp divides by them in files of architecture llama only.
    write_gguf(path, "qwen2", tensors=tensors_of("qwen2") | {"rope_freqs.weight": divisors})
    assert "unknown tensor 'rope_freqs.weight' for qwen2" in refusal(path)


@pytest.mark.filterwarnings("ignore:this tokenizer has no chat template")
def test_there_is_one_bos_where_the_file_wants_one(tmp_path):
    """Without the key, llama.cpp adds one to the tokenizer of Llama 3 and to no other."""
    bos = vocabulary()[0].index("<bos>")

    def tokenizer(**changes):
        changes = {f"tokenizer.{key}": value for key, value in changes.items()}
        write_gguf(tmp_path / "m.gguf", fields=fields_of(**changes))
        return GGUFFile(str(tmp_path / "m.gguf")).tokenizer()

    for pre, add, wanted in (
        ("qwen2", None, 0),
        ("qwen2", True, 1),
        ("llama-bpe", None, 1),
        ("llama-bpe", False, 0),
    ):
        fields = {"ggml.pre": pre, "ggml.add_bos_token": add}
        plain = tokenizer(**fields)
        assert plain.render("a").count(bos) == wanted and bos not in plain.encode("a")
        chat = tokenizer(**fields, chat_template="{{ '<bos>' + messages[0]['content'] }}")
        assert chat.render("a") == [bos, *plain.encode("a")]


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    tensors = write_gguf(path)
    whole = path.read_bytes()
    for data, message in (
        (whole[:100], "truncated"),
        (whole[:-64], "truncated; output|truncated; blk"),
        (whole + b"more", "damaged GGUF file: it goes on after its last tensor"),
        (b"", "not a GGUF"),
        (whole.replace(b"blk.0.attn_norm", b"blk.0.ffn_norm.", 1), "unknown tensor"),
        (whole.replace(b"blk.0.attn_norm", b"blk.1.attn_norm", 1), "'blk.1.attn_norm.weight' is t"),
        (whole.replace(b"block_count", b"block_c\xffunt", 1), "truncated or damaged.*utf-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"m.gguf: .*({message})"):
            load_pretrained(str(path))
    at = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    moved = struct.pack("<Q", struct.unpack_from("<Q", whole, at)[0] + 32)
    path.write_bytes(whole[:at] + moved + whole[at + 8 :])
    assert "damaged GGUF file: output_norm.weight starts at byte" in refusal(path)
    write_gguf(path, tensors={k: v for k, v in tensors.items() if "attn_q" not in k})
    assert "the matrix model.layers.0.self_attn.q_proj is missing" in refusal(path)
    write_gguf(path, tensors=tensors | {"blk.0.ffn_norm.weight": np.ones((2, 2, 2), np.float32)})
    assert "blk.0.ffn_norm.weight has shape (2, 2, 2)" in refusal(path)
    write_gguf(path, "mamba")
    assert "architecture 'mamba' is not supported" in refusal(path)


@pytest.mark.parametrize(
    "value, message",
    [
        (struct.pack("<II", 4, 0), "general.alignment must be a whole number >= 1, not 0"),
        (struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, "'general.alignment' has arrays"),
        (struct.pack("<IIQ", 9, 4, 2**61), "at 'general.alignment': an array of 2305"),
        (struct.pack("<IQ", 8, 2**63), "at 'general.alignment': text beyond"),
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
    for kind in (9, 15, 26, 99):  # Q8_1, Q8_K, I32 and none
        path.write_bytes(data[:at] + kind.to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(UserError, match=r"blk.0.ffn_up.weight has an unsupported quant"):
            load_pretrained(str(path))
