# SPDX-License-Identifier: Apache-2.0
"""Chat templates with their switches, stop ids, and models without a template."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opsd_jax.data.problems import Problem
from opsd_jax.data.references import ReferenceRows
from opsd_jax.data.tokenizer import PLAIN_FORMAT, HFTokenizer, load_tokenizer
from opsd_jax.errors import UserError
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.pretrained.load import load_pretrained

SPECIAL = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def byte_tokenizer(template=TEMPLATE, **special):
    """Byte-level, no merges: every text round-trips."""
    alphabet = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    names = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": "<bos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)


@pytest.fixture
def directory(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("switches", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_rendered_ids_are_those_of_transformers(directory, switches):
    ours = load_tokenizer(str(directory)).render("What is 2+2?\n", **switches)
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [{"role": "user", "content": "What is 2+2?\n"}], add_generation_prompt=True, **switches
    )
    assert ours == theirs["input_ids"]
    thinks = "<think>" in AutoTokenizer.from_pretrained(directory).decode(ours)
    assert thinks == (switches.get("enable_thinking") is False)


def test_all_declared_ends_of_turn_stop(directory):
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert load_tokenizer(str(directory)).stop_ids == (1, 3)
    generation = {"eos_token_id": [4, 3], "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.stop_ids == (4, 3) and tokenizer.pad_id == 0


@pytest.mark.parametrize(
    "template, eos, end",
    [
        (TEMPLATE, "<|endoftext|>", 3),
        (TEMPLATE.replace("<|im_end|>", "<|endoftext|>", 1), "<|im_end|>", 4),
        ("{{ raise_exception('no') }}", "<|im_end|>", 3),
        ("{{ messages[0].content }}<bos>", "<|im_end|>", 3),
        (None, "<|endoftext|>", 4),
        (None, None, 1),
    ],
)
def test_a_reference_ends_as_the_template_ends_a_turn(template, eos, end):
    """And not with whichever stop id is declared first."""
    tokenizer = HFTokenizer(byte_tokenizer(template, eos_token=eos), stop_ids=(1, 3, 4))
    row = ReferenceRows(lambda p: {}, "{solution}", tokenizer, 4, "drop")(
        Problem("p", "q", "s", "")
    )
    ids = row["reference_ids"][: row["reference_length"]]
    assert ids.tolist() == [*tokenizer.encode("s"), end]


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_text_round_trips_without_stop_and_padding(text):
    tokenizer = HFTokenizer(BYTES, stop_ids=(4,))
    text = "".join(c for c in text if c != "<" and not "\ud800" <= c <= "\udfff")
    ids = tokenizer.encode(text)
    assert not set(ids) & set(range(len(SPECIAL)))
    assert tokenizer.decode([*ids, 4, 3, 0, 0]) == text


BYTES = byte_tokenizer()


def test_pad_falls_back_to_a_stop_id():
    tokenizer = HFTokenizer(byte_tokenizer(pad_token=None))
    assert tokenizer.pad_id == tokenizer.stop_ids[0] == 3


def test_without_a_template_the_plain_format_is_used_and_said_once(recwarn):
    tokenizer = HFTokenizer(byte_tokenizer(template=None))
    first = tokenizer.render("Hello")
    assert tokenizer.decode(first) == PLAIN_FORMAT.format(prompt="Hello")
    tokenizer.render("Hello again")
    assert [str(w.message) for w in recwarn if "no chat template" in str(w.message)] != []
    assert sum("no chat template" in str(w.message) for w in recwarn) == 1


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_larger_than_the_embedding_is_refused(directory):
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from opsd_jax.model.decoder import Decoder, init_variables
    from opsd_jax.pretrained.export import save_pretrained

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=200)
    config = config_from_hf({"model_type": "llama", "num_attention_heads": 2, **shape})
    shapes = jax.eval_shape(lambda: init_variables(Decoder(config), jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), nn.meta.unbox(shapes))["params"]
    save_pretrained(str(directory / "model"), config, {"params": params})
    for file in (directory / "model").iterdir():
        file.replace(directory / file.name)
    with pytest.raises(UserError, match="261 ids but the embedding only 200 rows"):
        load_pretrained(str(directory))
    (directory / "tokenizer.json").unlink()
    assert load_pretrained(str(directory)).tokenizer is None
