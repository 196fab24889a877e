# SPDX-License-Identifier: Apache-2.0
"""`opsd export`: the student of a run as files for transformers, vLLM or PEFT."""

from __future__ import annotations

from flax import linen as nn

from opsd_jax.errors import UserError
from opsd_jax.pretrained.export import save_adapter, save_pretrained
from opsd_jax.run.config import load_run
from opsd_jax.run.finished_run import restore_run, say


def export_command(workdir: str, step: int | str | None, out: str, form: str) -> None:
    """`opsd export`: a Hugging Face directory (adapters merged) or a PEFT adapter."""
    run = restore_run(workdir, step, load_run, with_teacher=False)
    config = run.parts.model.config
    if form == "peft":
        if config.lora is None:
            raise UserError(
                f"--format=peft: {workdir} trains all parameters and has no adapter; use "
                "--format=hf"
            )
        base = getattr(run.experiment.train.model, "path", "")
        save_adapter(out, config, run.student, base)
    else:
        save_pretrained(out, config, nn.meta.unbox(run.student), run.tokenizer)
    say(f"step {run.step} written to {out}")
