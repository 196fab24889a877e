# SPDX-License-Identifier: Apache-2.0
"""Trains the base model of the testbed, and refuses one from which distillation would not work.

From random weights to a model that writes the testbed's notation, holds the corpus's beliefs, uses
a reference when it has one, and falls back on its memory when it does not. The result is judged by
a gate (`BaseReport.failures`); training goes on until the gate is passed.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from optax.contrib import MuonDimensionNumbers, muon

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Natural, Positive, Seed, require
from opsd_jax.host.files import require_writable, scratch_folder
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.rollout import rollout
from opsd_jax.testbed.base_report import BaseReport
from opsd_jax.testbed.corpus import CorpusConfig, write_rows
from opsd_jax.testbed.probe import (
    after_wrong_step,
    corrected_belief,
    fact_beliefs,
    prompt_with,
)
from opsd_jax.testbed.world import ChainTask, ChainTokenizer, grade

# Part of the cache key: raise it when the corpus or the training below changes its results.
RECIPE_VERSION = 5
_STEPS_PER_CALL = 20

TESTBED_MODEL = ModelConfig(
    vocab_size=ChainTokenizer.vocab_size,
    num_layers=3,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    mlp_dim=128,
    rope_theta=100.0,
    remat=False,
)


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """The recipe of the base model.

    Attributes:
      seed: of the initial weights and of the corpus.
      num_steps: optimiser steps of the first round.
      extra_steps: of each further round, taken until the gate is passed.
      max_rounds: after so many rounds a base that fails the gate is refused.
      hinted_rows: rows with a reference in each step.
      plain_rows: rows without one.
      answer_rows: rows with an answer in the student's own notation; 0 teaches none.
      feedback_rows: rows with what one line should be; 0 teaches none. The gate asks for what is
        taught.
      learning_rate: peak of the first round; further rounds take `extra_learning_rate`.
      extra_learning_rate: see there.
      muon_scale: Muon's learning rate, for the matrices of the layers, as a multiple of Adam's.
      warmup_steps: linear warm-up of every round; a cosine to 5 % follows.
      corpus: how the rows are disturbed.
      task: the world.
      require_gate: False also accepts a base that fails the gate, after the first round (to study
        leaky teachers).
    """

    seed: Seed = 0
    num_steps: Count = 1000
    extra_steps: Count = 300
    max_rounds: Count = 5
    hinted_rows: Count = 64
    plain_rows: Count = 24
    answer_rows: Natural = 0
    feedback_rows: Natural = 0
    learning_rate: Positive = 3e-3
    extra_learning_rate: Positive = 2e-3
    muon_scale: Positive = 7.0
    warmup_steps: Natural = 50
    corpus: CorpusConfig = CorpusConfig()
    task: ChainTask = ChainTask()
    require_gate: bool = True

    def __post_init__(self):
        require("WarmStart", self)


@dataclasses.dataclass(frozen=True)
class WarmStarted:
    """A base model: its parameters (host arrays), its report and the steps it took."""

    params: dict
    report: BaseReport
    num_steps: int


def load_or_train(
    config: WarmStartConfig,
    model_config: ModelConfig,
    cache_dir: str | os.PathLike,
    say: Callable[[str], None] = print,
) -> WarmStarted:
    """The base of this recipe from below `cache_dir`, or trained now and kept there.

    Raises:
      UserError: the base fails the gate, or the directory cannot be written.
    """
    recipe = {
        "version": RECIPE_VERSION,
        "warm_start": dataclasses.asdict(config),
        "model": dataclasses.asdict(model_config),
    }
    recipe = json.loads(json.dumps(recipe))
    for later in ("answer_rows", "feedback_rows"):  # A base without them keeps its old name.
        if not recipe["warm_start"][later]:
            del recipe["warm_start"][later]
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    place = pathlib.Path(cache_dir) / f"testbed_base_{name}"
    base = _read(place, recipe, say)
    if base is None:
        require_writable(place.parent)  # before the minutes of training
        base = warm_start(config, model_config, say)
        _write(place, recipe, base)
    return base


def warm_start(
    config: WarmStartConfig, model_config: ModelConfig, say: Callable[[str], None] = print
) -> WarmStarted:
    """Trains a base from random weights until it passes the gate.

    Raises:
      UserError: it still fails after `max_rounds`; the message says in which figures.
    """
    model = Decoder(model_config)
    params = nn.meta.unbox(init_variables(model, jax.random.key(config.seed)))["params"]
    # Unit-variance embeddings: at the usual 0.02 a symbol table this small starts out invisible
    # beside the residual updates of the layers.
    params["embed"] = params["embed"] / params["embed"].std()
    rng = np.random.default_rng(config.seed)
    total = 0
    for round_number in range(config.max_rounds):
        params = _train_round(config, model, params, rng, round_number, say)
        total += config.extra_steps if round_number else config.num_steps
        report = measure(model, params, config)
        say(f"warm start: {total} steps, {report.summary()}")
        failures = report.failures()
        if not failures or not config.require_gate:
            return WarmStarted(jax.device_get(params), report, total)
        say(f"warm start: not yet a base: {'; '.join(failures)}")
    raise UserError(
        f"The warm start failed its gate after {total} steps: {'; '.join(failures)}. Raise "
        "max_rounds, take another seed, or set require_gate = False to study such a base."
    )


def measure(
    model: Decoder,
    params: dict,
    config: WarmStartConfig,
    num_problems: int = 1024,
    seed: int = 0,
) -> BaseReport:
    """Judges a base on held-out problems."""
    variables, tokenizer, task = {"params": params}, ChainTokenizer(), config.task
    heldout = np.random.RandomState(seed).permutation(np.flatnonzero(task.heldout))
    problems = [task.record(int(i)) for i in heldout[:num_problems]]

    def accuracy(shown, temperature=1.0):
        rollouts = RolloutConfig(
            task.response_len,
            temperature=temperature,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
        )
        prompts = [tokenizer.encode(prompt_with(shown, problem)) for problem in problems]
        ids = jnp.array(prompts, jnp.int32)
        lengths = jnp.full(len(ids), ids.shape[1], jnp.int32)
        completion = _rollout(model, rollouts, variables, ids, lengths, jax.random.key(seed))
        texts = map(tokenizer.decode, np.asarray(completion.ids))
        return float(np.mean([grade(p, text) for p, text in zip(problems, texts, strict=True)]))

    def probe(shown):
        return after_wrong_step(model, variables, tokenizer, task, shown)

    (student_ok, student_leak), (teacher_ok, teacher_leak) = probe("nothing"), probe("reference")
    belief = fact_beliefs(model, variables, tokenizer, task)
    return BaseReport(
        student=accuracy("nothing"),
        student_greedy=accuracy("nothing", 0.0),
        teacher=accuracy("reference"),
        student_ok=student_ok,
        student_leak=student_leak,
        teacher_ok=teacher_ok,
        teacher_leak=teacher_leak,
        weak=float(belief[task.is_weak].mean()),
        strong=float(belief[~task.is_weak].mean()),
        answer=accuracy("answer") if config.answer_rows else None,
        answer_ok=probe("answer")[0] if config.answer_rows else None,
        feedback=(
            corrected_belief(model, variables, tokenizer, task) if config.feedback_rows else None
        ),
        feedback_ok=probe("feedback")[0] if config.feedback_rows else None,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rollout(model, config, variables, ids, lengths, key):
    return rollout(model, variables, ids, lengths, key, config)


def _train_round(config, model, params, rng, round_number, say):
    """One warm-up and cosine; the corpus of each call is written while nothing else runs."""
    steps = config.extra_steps if round_number else config.num_steps
    peak = config.extra_learning_rate if round_number else config.learning_rate
    optimizer = _optimizer(config, params, steps, peak)
    memory = jnp.array(config.task.memory.reshape(-1, config.task.memory.shape[-1]), jnp.float32)
    train = jax.jit(
        functools.partial(_train_steps, model, optimizer, memory), donate_argnums=(0, 1)
    )
    # Donation needs its own buffers.
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    opt_state = optimizer.init(params)
    kinds = (
        ("reference", config.hinted_rows),
        ("nothing", config.plain_rows),
        ("answer", config.answer_rows),
        ("feedback", config.feedback_rows),
    )
    start = 0.0
    for done in range(0, steps, _STEPS_PER_CALL):
        rows = tuple(
            _corpus_rows(config, rng, num_rows, shown) for shown, num_rows in kinds if num_rows
        )
        params, opt_state, loss = train(params, opt_state, rows)
        said = f"warm start: step {done + _STEPS_PER_CALL}/{steps}, excess loss {float(loss):.4f}"
        start = start or time.monotonic()  # Compilation is not counted.
        if done:
            left = round((time.monotonic() - start) * (steps - done - _STEPS_PER_CALL) / done)
            said += f", {left // 60}:{left % 60:02d} left"
        say(f"\r{said}")  # A live line, see host/progress.py.
    return params


def _optimizer(config, params, steps, peak):
    """Muon for the matrices of the layers, AdamW for embedding, head and norms.

    Comparing two keys at once (left digit and step) is what the base learns last. Muon
    (https://kellerjordan.github.io/posts/muon) learns it in less than half the steps that AdamW
    alone takes, at the same cost per step.
    """
    warmup = min(config.warmup_steps, steps // 2)

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, 0.05 * peak)

    def matrix(path, leaf):
        """Axes of a layer's kernel that are summed over and that come out; axis 0 is the layer."""
        if path[-1].key != "kernel":
            return None
        num_in = 2 if path[-2].key == "o_proj" else 1
        axes = tuple(range(1, leaf.ndim))
        return MuonDimensionNumbers(axes[:num_in], axes[num_in:])

    optimizer = muon(
        schedule(config.muon_scale * peak),
        weight_decay=0.01,
        adam_learning_rate=schedule(peak),
        adam_b2=0.98,
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(matrix, params),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def _corpus_rows(config, rng, num_rows, shown):
    """(ids, targets, target_fact), each [steps per call, num_rows, ...]."""
    rows = write_rows(config.task, config.corpus, rng, _STEPS_PER_CALL * num_rows, shown)
    arrays = (rows.ids, rows.targets, rows.target_fact)
    return tuple(x.reshape(_STEPS_PER_CALL, num_rows, -1) for x in arrays)


def _train_steps(model, optimizer, memory, params, opt_state, rows):
    """`_STEPS_PER_CALL` optimiser steps in one call, so that dispatch costs nothing."""

    def step(carry, rows):
        params, opt_state = carry
        loss, gradient = jax.value_and_grad(_loss)(params, model, memory, rows)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), rows)
    return params, opt_state, losses.mean()


def _loss(params, model, memory, kinds):
    """Mean KL(corpus || model) in nats over the response tokens of hinted and plain rows.

    Where the writer consulted its memory the target is the whole belief, not the drawn digit.
    """
    total, count = 0.0, 0
    for ids_BT, targets_BC, fact_BC in kinds:
        inputs = ids_BT[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        hidden, _ = model.apply({"params": params}, inputs, positions)
        hidden = hidden[:, -targets_BC.shape[1] :]
        logits = head_logits(output_head(params, model.config), hidden)
        logps_BCV = jax.nn.log_softmax(logits, axis=-1)
        V = logps_BCV.shape[-1]
        belief = jnp.pad(memory, ((0, 0), (0, V - memory.shape[-1])))[jnp.maximum(fact_BC, 0)]
        certain = jax.nn.one_hot(targets_BC, V)
        target_BCV = jnp.where(fact_BC[..., None] >= 0, belief, certain)
        total += jnp.sum(jax.scipy.special.xlogy(target_BCV, target_BCV) - target_BCV * logps_BCV)
        count += targets_BC.size
    return total / count


def _read(place: pathlib.Path, recipe: dict, say: Callable[[str], None]) -> WarmStarted | None:
    """The kept base, or None if there is none or it cannot be used."""
    from safetensors.numpy import load_file

    if not place.exists():
        return None
    try:
        record = json.loads((place / "base.json").read_text())
        if record["recipe"] != recipe:
            raise ValueError("its recipe is another one")
        flat = load_file(place / "base.safetensors")
        params = flax.traverse_util.unflatten_dict(flat, sep="/")
        say(f"warm start: base found in {place}")
        return WarmStarted(params, BaseReport(**record["report"]), record["num_steps"])
    except Exception as error:  # Any damage has the same cure, and safetensors has its own type.
        say(f"warm start: {place} cannot be used ({error}); training the base again")
        return None


def _write(place: pathlib.Path, recipe: dict, base: WarmStarted) -> None:
    """Keeps a base; it appears under its name only once it is complete."""
    from safetensors.numpy import save_file

    with scratch_folder(place.parent, f".{place.name}_") as scratch:
        flat = flax.traverse_util.flatten_dict(base.params, sep="/")
        # safetensors writes the buffer as it lies: a transposed view would be saved wrong.
        arrays = {name: np.ascontiguousarray(value) for name, value in flat.items()}
        save_file(arrays, scratch / "base.safetensors")
        record = {
            "recipe": recipe,
            "report": dataclasses.asdict(base.report),
            "num_steps": base.num_steps,
        }
        (scratch / "base.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(place, ignore_errors=True)
        os.replace(scratch, place)
