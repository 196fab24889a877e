# SPDX-License-Identifier: Apache-2.0
"""The steps of step.py by TRL's SDFTTrainer, in the Python that `step.py --trl=PYTHON` names.

Needs trl (tried: 1.16.0) and torch there, and nothing of this repository. Prints one JSON object:
median seconds of a rollout, of the rest of a step, and the most memory the process held.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

PROMPT, TEACHER = 64, 128


def words(size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of `size` words between spaces: w0 is unknown, w1 pads, w2 ends."""
    vocabulary = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2"
    )


def network(vocabulary: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        pad_token_id=1,
        eos_token_id=2,
    )
    return transformers.Qwen3ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("batch", "completion", "vocabulary", "turns"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        ids = torch.randint(20, arguments.vocabulary, (PROMPT,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist())

    num_rows = arguments.batch * (arguments.turns + 1)
    rows = [{"prompt": text(), "privileged_context": text()} for _ in range(num_rows)]
    assert TEACHER == 2 * PROMPT  # as the default template joins them
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"  # read twice: the teacher is made of what lies there
        network(arguments.vocabulary).save_pretrained(model)
        config = SDFTConfig(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch,
            max_steps=arguments.turns + 1,
            num_generations=1,
            max_completion_length=arguments.completion,
            generation_kwargs={"min_new_tokens": arguments.completion},
            distillation_mode="full_logits",
            distillation_alpha=0.5,
            teacher_model_kind="base",
            learning_rate=5e-6,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            logging_steps=1000,
        )
        trainer = SDFTTrainer(
            model,
            config,
            Dataset.from_list(rows),
            processing_class=words(arguments.vocabulary),
        )
        rollouts, steps = [], [time.perf_counter()]
        sample = trainer.sample_rollouts

        def timed_sample(inputs):
            start = time.perf_counter()
            batch = sample(inputs)
            rollouts.append(time.perf_counter() - start)
            assert batch["completion_ids"].shape == (arguments.batch, arguments.completion)
            return batch

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *_, **__):
                steps.append(time.perf_counter())

        trainer.sample_rollouts = timed_sample
        trainer.add_callback(Clock())
        trainer.train()
    whole = [b - a for a, b in zip(steps[1:-1], steps[2:], strict=True)]  # the first is left out
    rollout = statistics.median(rollouts[1:])
    update = statistics.median(w - r for w, r in zip(whole, rollouts[1:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"rollout_s": rollout, "update_s": update, "peak_mb": peak}))


if __name__ == "__main__":
    main()
