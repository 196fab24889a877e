# SPDX-License-Identifier: Apache-2.0
"""Eight virtual devices for every test, and fixtures that several files share."""

import atexit
import collections
import os
import shutil
import tempfile
import uuid
from importlib.metadata import version

# Before jax is imported: the device count cannot change afterwards.
FLAGS = "--xla_force_host_platform_device_count=8"
# The tests compile some thousand tiny programs and run each a few times: optimising them well costs
# three times as much. OPSD_FULL_COMPILE=1 compiles as for users, as .ci/run does for a part of the
# tests. XLA aborts at a flag that its release does not know: another release compiles fully, too.
if os.environ.get("OPSD_FULL_COMPILE") != "1" and version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Many tests, the workers of pytest-xdist and their subprocesses compile the same tiny programs.
# A folder that was given (.ci/run gives one to the fast and the slow tests) is not ours to remove.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="opsd_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

from opsd_jax.errors import UserError  # noqa: E402
from opsd_jax.model.config import LoraConfig, ModelConfig  # noqa: E402
from opsd_jax.pretrained.smollm2 import smollm2_path  # noqa: E402
from tests.tiny import tiny_config  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Hundreds of compiled programs would otherwise stay in memory until the end."""
    yield
    jax.clear_caches()


@pytest.fixture(params=["full", "lora"])
def any_config(request) -> ModelConfig:
    """The tiny model, fully trained and with adapters."""
    return tiny_config(lora=LoraConfig(rank=3, alpha=6.0) if request.param == "lora" else None)


@pytest.fixture(scope="session")
def smollm2_file() -> str:
    """SmolLM2's file, downloaded once; offline the test is skipped, or fails if
    OPSD_REQUIRE_SMOLLM2=1."""
    try:
        return smollm2_path()
    except UserError as error:
        if os.environ.get("OPSD_REQUIRE_SMOLLM2") == "1":
            raise
        pytest.skip(str(error))


@pytest.fixture
def bucket_run(monkeypatch):
    """gs://memory/ANOTHER as a BucketPath: a bucket in this process's memory, by tensorstore's own
    driver in the place of Google's. Nothing is there yet."""
    from opsd_jax.host import bucket  # late: most tests need none

    monkeypatch.setitem(bucket._SPECS, "gs", lambda name: {"driver": "memory"})
    return bucket.BucketPath(f"gs://memory/{uuid.uuid4().hex}")


@pytest.fixture(scope="module", params=["s3", "gs"])
def emulated(request):
    """s3://some-bucket or gs://some-bucket, on a server of this machine."""
    from tests.object_store import BUCKET, gs_store, s3_store  # late: most tests need none

    store = {"s3": s3_store, "gs": gs_store}[request.param]
    with store() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"{request.param}://{BUCKET}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays on one worker, which makes its models and compiles its programs once."""
    if config.getvalue("dist") == "load":
        from xdist.scheduler import LoadFileScheduling

        return LoadFileScheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    """The ten slowest files: set-up, tests and tear-down, summed over the workers."""
    seconds: collections.Counter[str] = collections.Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if hasattr(report, "duration"):
            seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest files")
    for name, spent in seconds.most_common(10):
        terminalreporter.write_line(f"{spent:7.1f} s  {name}")
