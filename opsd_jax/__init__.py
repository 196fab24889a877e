# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation in JAX (arXiv 2601.18734): one model is student and teacher.

Whole runs, as the command line has them; a call that is repeated goes on where it was stopped:

    run = opsd_jax.train("experiments/quickstart.gin", "runs/quick", ["train.num_steps = 60"])
    run.metrics["eval/student/accuracy"]    # [N] float64, aligned with run.steps
    run.samples()[0]["completion"], run.student, run.model, run.tokenizer
    opsd_jax.evaluate("runs/quick", step="best")["eval/student/accuracy"]
    opsd_jax.plot({"OPSD": "runs/quick", "GRPO": ["runs/grpo_1", "runs/grpo_2"]})
    opsd_jax.report(["runs/quick", "runs/grpo_1"])  # all of it on one page
    opsd_jax.tokens("runs/quick")                   # where the teacher disagrees
    opsd_jax.compare_evaluations("runs/quick/eval/a", "runs/quick/eval/b")

`load_run(workdir)` reads a run that is there. `experiment, text = load_experiment(gin_files,
bindings)` is what would be run; `train` takes that experiment, too. All that is wrong with an
input is a `UserError`.

A model:

    model, variables = opsd_jax.load_model(path)  # or Decoder(ModelConfig(…)), random_variables
    tokenizer = opsd_jax.load_tokenizer(path)     # or ChainTokenizer() of the built-in world
    logits = opsd_jax.forward(model, variables, ids, lengths)

One step by hand: problems (`Problem`, or `ChainArithmetic(…).load(None)`) under a `ContextConfig`
become a `Batch` of two `Context`s, the student's rollout a `Completion`, and `compare` gives the
divergence and entropies of every token of it:

    batch = opsd_jax.make_batch(contexts, tokenizer, problems)
    config = opsd_jax.RolloutConfig(64, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    completion = opsd_jax.rollout(
        model, variables, batch.student.ids, batch.student.lengths, jax.random.key(0), config
    )
    terms = opsd_jax.compare(
        model, opsd_jax.DivergenceConfig(), variables, teacher_variables, batch, completion
    )
    opsd_jax.divergence.forward_kl(student_logits, teacher_logits)

With an update: `train_step(method, state, batch)`, where method is a `Method`, built of a
`TeacherConfig` and others, and state comes from `init_state`. Adapters are `LoraConfig`; a mesh of
devices is `make_mesh(MeshConfig())`. notebooks/01_one_step.ipynb and experiments/minimal.py do
this.

Names are imported on first use, so that `import opsd_jax` costs nothing and the numerical core
needs jax, flax and optax alone.

The shape alphabet of the whole package: B batch, T tokens (queries), S keys, P student prompt,
Q teacher prompt, C completion, V vocabulary, D model width, F MLP width, L layers, N query heads,
K key/value heads, G = N / K, H head width, R LoRA rank, A micro-batches.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> where it is defined. None of them is the name of a submodule of opsd_jax, whose import
# would put the module in its place.
_HOME = {
    # Whole runs.
    "train": "opsd_jax.run.notebook",
    "evaluate": "opsd_jax.run.notebook",
    "load_run": "opsd_jax.run.notebook",
    "plot": "opsd_jax.evaluation.plot",
    "tokens": "opsd_jax.run.notebook",
    "report": "opsd_jax.evaluation.inline",
    "compare_evaluations": "opsd_jax.evaluation.inline",
    "load_experiment": "opsd_jax.run.config",
    "UserError": "opsd_jax.errors",
    # Models.
    "load_model": "opsd_jax.pretrained.interface",
    "forward": "opsd_jax.pretrained.interface",
    "load_tokenizer": "opsd_jax.data.tokenizer",
    "Decoder": "opsd_jax.model.decoder",
    "ModelConfig": "opsd_jax.model.config",
    "LoraConfig": "opsd_jax.model.config",
    "random_variables": "opsd_jax.run.by_hand",
    "MeshConfig": "opsd_jax.model.sharding",
    "make_mesh": "opsd_jax.model.sharding",
    # Problems and what each role sees of them.
    "Problem": "opsd_jax.data.problems",
    "ContextConfig": "opsd_jax.data.contexts",
    "make_batch": "opsd_jax.run.by_hand",
    "ChainArithmetic": "opsd_jax.testbed.problems",
    "ChainTokenizer": "opsd_jax.testbed.world",
    # One step.
    "Context": "opsd_jax.sampling.prompts",
    "Batch": "opsd_jax.method.batch",
    "rollout": "opsd_jax.sampling.rollout",
    "RolloutConfig": "opsd_jax.sampling.config",
    "Completion": "opsd_jax.sampling.prompts",
    "compare": "opsd_jax.method.objective",
    "DivergenceConfig": "opsd_jax.divergence.config",
    "train_step": "opsd_jax.method.train_step",
    "Method": "opsd_jax.method.train_step",
    "init_state": "opsd_jax.method.train_step",
    "TeacherConfig": "opsd_jax.method.teacher",
}
_MODULES = ("divergence",)

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"opsd_jax.{name}")
    if name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'opsd_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
