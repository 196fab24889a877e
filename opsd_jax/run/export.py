# SPDX-License-Identifier: Apache-2.0
"""`opsd export`: the student of a run as files for transformers, vLLM or PEFT."""

from __future__ import annotations

from pathlib import Path

from flax import linen as nn

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.host.files import require_writable
from opsd_jax.pretrained.export import new_folder, save_adapter, save_pretrained
from opsd_jax.pretrained.smollm2 import smollm2_path
from opsd_jax.run.config import load_run
from opsd_jax.run.finished_run import restore_run, say


def export_command(workdir: str, step: int | str | None, out: str, form: str) -> None:
    """`opsd export`: a Hugging Face directory (adapters merged) or a PEFT adapter."""
    new_folder(out, apart_from=workdir)  # before minutes are spent
    require_writable(Path(out))
    run = restore_run(workdir, step, load_run, with_teacher=False)
    config = run.parts.model.config
    if form == "peft":
        if config.lora is None:
            raise UserError(
                f"--format=peft: {workdir} trains all parameters and has no adapter; use "
                "--format=hf"
            )
        path = getattr(run.experiment.train.model, "path", "")
        save_adapter(out, config, run.student, smollm2_path() if path == "smollm2" else path)
    else:
        params, stop_ids = nn.meta.unbox(run.student), run.experiment.rollout.stop_ids
        save_pretrained(out, config, params, run.tokenizer, stop_ids=stop_ids)
    say(f"step {run.step} written to {out}")
    if form == "hf" and not isinstance(run.tokenizer, HFTokenizer):
        say(
            "the testbed's tokenizer has no files, so text needs the run itself: "
            f"opsd generate --workdir={workdir}, or train.model = @FinishedRun()"
        )
