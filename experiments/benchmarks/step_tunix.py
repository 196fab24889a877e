# SPDX-License-Identifier: Apache-2.0
"""The steps of step.py by tunix's parts, in the Python that `step.py --tunix=PYTHON` names.

tunix has no on-policy self-distillation; its Sampler writes the completions and its
DistillationTrainer learns from them: forward KL over the whole vocabulary (it has no JSD) to a copy
of the model at the start, which reads another prompt. Needs google-tunix there (tried: 0.1.7) and
nothing of this repository. Prints one JSON object: median seconds of a rollout, of the rest of a
step, and the most memory the process held.
"""

import argparse
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation.distillation_trainer import (
    DistillationTrainer,
    TrainingConfig,
    TrainingInput,
)
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig, Qwen3

PROMPT, TEACHER = 64, 128
LAYERS, KEY_HEADS, WIDTH = 4, 4, 32


class Words:
    """A tokenizer of words w0, w1, …: w1 pads, w2 ends."""

    def encode(self, text, **_):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(f"w{i}" for i in ids)

    def bos_id(self):
        return None

    def pad_id(self):
        return 1

    def eos_id(self):
        return 2


def network(vocabulary: int) -> Qwen3:
    config = ModelConfig(
        num_layers=LAYERS,
        vocab_size=vocabulary,
        embed_dim=256,
        hidden_dim=768,
        num_heads=8,
        head_dim=WIDTH,
        num_kv_heads=KEY_HEADS,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    return Qwen3(config, rngs=nnx.Rngs(0))


def logits(model: Qwen3, prompt_ids: jax.Array, completion_ids: jax.Array) -> jax.Array:
    """[B, C, V] of the completion."""
    ids = jnp.concatenate([prompt_ids, completion_ids], axis=1)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    seen = positions[:, :, None] >= positions[:, None, :]
    whole, _ = model(ids, positions, None, seen)
    return whole[:, prompt_ids.shape[1] - 1 : -1]


class Steps:
    """The batches of a training run, each sampled when it is asked for."""

    def __init__(self, student: Qwen3, arguments: argparse.Namespace):
        self.student, self.arguments = student, arguments
        size = PROMPT + arguments.completion + 1
        cache = CacheConfig(size, LAYERS, KEY_HEADS, WIDTH)
        self.sampler = Sampler(student, Words(), cache)
        self.clock: list[tuple[float, float]] = []  # before and after each rollout

    def __iter__(self):
        batch, numbers = self.arguments.batch, np.random.default_rng(0)
        for step in range(self.arguments.turns + 2):
            prompt, teacher = (
                numbers.integers(20, self.arguments.vocabulary, (batch, width), dtype=np.int32)
                for width in (PROMPT, TEACHER)
            )
            jax.block_until_ready(nnx.state(self.student))
            start = time.perf_counter()
            self.sampler.transformer_state = nnx.variables(self.student, nnx.Param)
            said = self.sampler(
                [Words().decode(row) for row in prompt],
                max_generation_steps=self.arguments.completion,
                max_prompt_length=PROMPT,
                forbidden_tokens=[2],
                temperature=1.0,
                top_p=1.0,
                seed=step,
                pad_output=True,
            )
            completion = np.asarray(jax.block_until_ready(said.tokens), np.int32)
            assert completion.shape == (batch, self.arguments.completion)
            self.clock.append((start, time.perf_counter()))
            arrays = {"prompt": prompt, "teacher": teacher, "completion": completion}
            yield TrainingInput(input_tokens=arrays, input_mask=np.ones(completion.shape, bool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("batch", "completion", "vocabulary", "turns"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    student, teacher = network(arguments.vocabulary), network(arguments.vocabulary)
    strategy = LogitStrategy(
        student_forward_fn=lambda model, prompt, teacher, completion: logits(
            model, prompt, completion
        ),
        teacher_forward_fn=lambda model, prompt, teacher, completion: logits(
            model, teacher, completion
        ),
        labels_fn=lambda prompt, teacher, completion: jax.nn.one_hot(completion, 1),
        temperature=1.0,
        alpha=1.0,
    )
    trainer = DistillationTrainer(
        student,
        teacher,
        strategy,
        optax.adamw(5e-6),
        TrainingConfig(eval_every_n_steps=10**9, max_steps=arguments.turns + 1),
    )
    steps = Steps(student, arguments)
    trainer.with_gen_model_input_fn(lambda inputs: inputs.input_tokens)
    trainer.train(steps)
    (_, *before), after = zip(*steps.clock, strict=True)
    updates = [start - end for end, start in zip(after[:-1], before, strict=True)]
    rollouts = [end - start for start, end in steps.clock]
    found = {
        "rollout_s": statistics.median(rollouts[1:-1]),  # the first compiles
        "update_s": statistics.median(updates[1:]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
