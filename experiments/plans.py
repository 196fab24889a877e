# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe on chips that are not here: memory and the least time of a step, in one table.

    pip install -e '.[plan-tpu,plan-cuda]'
    python experiments/plans.py --out=runs/plans [--only=1p7b,h100] [--processes=2]

Three models x adapters or all parameters x six targets, as `opsd plan` has them: prompts of 512
and 2,048 tokens, 1,024 new ones, nothing is run. Each is compiled in a process of its own, one to
eight minutes of one core. A plan that is finished is kept below --out; in the end OUT/plans.csv and
OUT/table.md.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # Nothing runs; a chip that is here is not taken.

import command
from processes import in_processes

from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json
from opsd_jax.model.config import ModelConfig
from opsd_jax.plan.command import Plan, exchanged, make_plan, padded_lengths
from opsd_jax.plan.estimate import REACHED, executed_flops
from opsd_jax.plan.step import Widths
from opsd_jax.plan.targets import GIB, find_target
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.run import flags
from opsd_jax.run.config import load_experiment
from opsd_jax.run.flops import step_flops

HERE = Path(__file__).parent
WIDTHS = Widths(512, 2048)
# What the published config.json of Qwen3 says: width, layers, heads, width of the MLP, tied head.
MODELS = {
    "1p7b": (2048, 28, 16, 6144, True),
    "4b": (2560, 36, 32, 9728, True),
    "8b": (4096, 36, 32, 12288, False),
}
NAMES = {"1p7b": "1.7B", "4b": "4B", "8b": "8B"}
TUNED = {"adapters": (), "all": ("train.lora = None",)}
# The kernel that was never run on a card, and adapters merged: what launches fewest kernels.
CARD = ("rollout.attention = 'pallas'", "rollout.merge_adapters = True")
# Rows of a micro-batch divide over the chips.
SIXTEEN = ("train.num_micro_batches = 2",)
TARGETS = {
    "h100:1": CARD,
    "h100:4": CARD,
    "h100:8": CARD,
    "v5e:4x4": SIXTEEN,
    "v5p:2x2x2": (),
    "v6e:4x4": SIXTEEN,
}
Row = dict[str, Any]


def cases() -> dict[str, tuple[str, str, str]]:
    """name -> (model, what is trained, target)."""
    found = [(m, t, target) for m in MODELS for t in TUNED for target in TARGETS]
    return {"_".join(case).replace(":", "-"): case for case in found}


def bindings(tuned: str, target: str) -> tuple[str, ...]:
    lines = (*TUNED[tuned], *TARGETS[target])
    return tuple(line for line in lines if tuned != "all" or "merge_adapters" not in line)


def qwen3(width: int, layers: int, heads: int, mlp: int, tied: bool) -> ModelConfig:
    """A model of Qwen3's family, as its config.json has it."""
    return config_from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": mlp,
            "max_position_embeddings": 40960,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "tie_word_embeddings": tied,
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )


def plan(name: str, out: Path) -> None:
    """Writes OUT/NAME.json, a row of the table."""
    model, tuned, target = cases()[name]
    file, lines = HERE / "paper" / f"qwen3_{model}.gin", bindings(tuned, target)
    experiment, _ = load_experiment([str(file)], list(lines))
    found = find_target(target)
    made = make_plan(experiment, qwen3(*MODELS[model]), found, WIDTHS)
    row = {"model": NAMES[model], "trained": tuned, "target": target, "bindings": "; ".join(lines)}
    text = json.dumps(row | numbers(made) | {"fits": "yes" if made.fits(found) else "no"})
    part = out / f"{name}.part"
    part.write_text(text, encoding="utf-8")
    part.rename(out / f"{name}.json")


def numbers(made: Plan) -> Row:
    """GiB, TFLOPs, seconds and chip-hours of a plan; "" where the compiler refused."""
    row: Row = {"arguments": "", "temporaries": "", "refused": made.refused}
    row |= dict.fromkeys(("tflops", "recomputed", "kernels", "rollout_gib", "update_gib"), "")
    row |= dict.fromkeys(("rollout_s", "update_s", "chip_hours"), "")
    row["compile_s"] = round(made.compile_s)
    if made.refused:
        return row
    row |= {"arguments": made.arguments / GIB, "temporaries": made.temporaries / GIB}
    lengths, chips = padded_lengths(made.experiment, WIDTHS), made.parts.mesh.size
    done, needed = executed_flops(made.parts, lengths), step_flops(made.parts.method, lengths)
    if done is None or needed is None or made.seconds is None:
        raise UserError("the work or the peak of this case has no formula")
    row |= {"tflops": sum(done) / chips / 1e12, "recomputed": sum(done) / sum(needed) - 1}
    moved = {scope: 0.0 for scope in ("rollout", "update")}
    for (scope, _), num_bytes in exchanged(made.found).items():
        if scope in moved:
            moved[scope] += num_bytes / GIB
    row |= {f"{scope}_gib": value for scope, value in moved.items()}
    row |= {"rollout_s": made.seconds.rollout, "update_s": made.seconds.update}
    row["kernels"] = "" if made.kernels is None else round(made.kernels)
    row["chip_hours"] = 100 * made.seconds.step / REACHED * chips / 3600
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Markdown, a line per row of plans.csv."""
    columns = "model, trained, target, GiB a chip (arguments + temporaries), fits"
    columns += ", TFLOPs a chip, exchanged, kernels a token, floor s (rollout + update), chip-hours"
    heads = columns.split(", ")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["model"], row["trained"], row["target"]]
        if row["refused"]:
            cells += [row["refused"], "no", *[""] * 5]
        else:
            parts = [float(row[name]) for name in ("arguments", "temporaries")]
            cells += [f"{sum(parts):.1f} ({parts[0]:.1f} + {parts[1]:.1f})", row["fits"]]
            cells += [f"{float(row['tflops']):.0f}"]
            cells += [f"{float(row['rollout_gib']):.1f} + {float(row['update_gib']):.1f} GiB"]
            seconds = [float(row[name]) for name in ("rollout_s", "update_s")]
            cells += [row["kernels"], f"{sum(seconds):.2f} ({seconds[0]:.2f} + {seconds[1]:.2f})"]
            cells += [f"{float(row['chip_hours']):.1f}" if row["fits"] == "yes" else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = command.parser()
    parser.add_argument("--only", default="", help="parts of cases' names, all of which they have")
    parser.add_argument("--processes", type=flags.count, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    out = Path(arguments.out).resolve()
    wanted = [part for part in arguments.only.split(",") if part]
    chosen = [name for name in cases() if all(part in name for part in wanted)]
    if not chosen:
        raise UserError(f"--only={arguments.only}: no case; the names are {', '.join(cases())}")
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in chosen if not (out / f"{name}.json").exists()]
    jobs = [(plan, (name, out)) for name in missing]
    in_processes(jobs, max(1, min(arguments.processes, len(jobs))), out / "log.txt")
    rows = [read_json(out / f"{name}.json") for name in chosen]
    with (out / "plans.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = "\n".join(table(read_csv(out / "plans.csv")))
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    command.call(main)
