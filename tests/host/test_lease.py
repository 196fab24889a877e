# SPDX-License-Identifier: Apache-2.0
"""One writer of a bucket: it renews its lock, and who does not loses it."""

import threading
import time
from types import SimpleNamespace

import pytest

from opsd_jax.errors import UserError
from opsd_jax.host import lease as lease_module
from opsd_jax.host.bucket import BucketError
from opsd_jax.host.lease import Lease, kept

LEASE_S = 0.4


def ignore(_: str) -> None: ...


def test_a_second_writer_is_refused_while_the_first_renews(bucket_run):
    first, second = (Lease(bucket_run / ".lock", LEASE_S) for _ in range(2))
    first.take(ignore)
    said, uploads = [], []
    with kept(first, lambda: uploads.append(1), said.append):
        with pytest.raises(UserError, match=f"^another command is writing to {bucket_run}; wait"):
            second.take(said.append)
    assert len(said) == 1 and "to see if it is used" in said[0] and len(uploads) > 1
    second.take(said.append)  # the first has left
    assert len(said) == 1


def test_of_many_that_come_at_once_one_is_the_writer(bucket_run):
    leases, got = [Lease(bucket_run / ".lock", LEASE_S) for _ in range(16)], []

    def try_one(lease):
        try:
            lease.take(ignore)
            got.append(lease)
            with kept(lease, lambda: None, ignore):
                time.sleep(3 * LEASE_S)
        except UserError:
            pass

    threads = [threading.Thread(target=try_one, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_the_lock_of_a_dead_process_is_taken_over_and_a_frozen_one_gives_up(bucket_run):
    frozen, second = (Lease(bucket_run / ".lock", LEASE_S) for _ in range(2))
    frozen.take(ignore)
    frozen.confirm()  # at once: nothing is asked
    start = time.monotonic()
    second.take(ignore)
    assert time.monotonic() - start >= LEASE_S
    with pytest.raises(UserError, match="another process has taken over"):
        frozen.confirm()
    frozen.release()  # of what is another's, nothing
    second.renew()


def test_an_owner_whose_answer_was_lost_is_still_the_owner(bucket_run):
    lease = Lease(bucket_run / ".lock", LEASE_S)
    lease.take(ignore)
    before = lease._version
    lease.renew()
    lease._version = before
    lease.renew()
    lease.release()
    assert not (bucket_run / ".lock").is_file()


@pytest.mark.parametrize("lost", [False, True])
def test_a_renewal_counts_from_when_it_was_asked_for(bucket_run, monkeypatch, lost):
    """The store may have written at once and answered late, or an answer before was lost."""
    clock, written = [0.0], []
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    lease, write_if = Lease(bucket_run / ".lock"), type(bucket_run).write_if
    lease.take(ignore)

    def late(path, content, version):
        found = write_if(path, content, version)
        written.extend([found] * (found is not None))
        clock[0] += 40.0
        return found

    monkeypatch.setattr(type(bucket_run), "write_if", late)
    if lost:
        write_if(bucket_run / ".lock", lease._text(), lease._version)
    lease.renew()
    assert len(written) == 1
    lease.confirm()
    assert len(written) == 2


@pytest.mark.parametrize("kind", [BucketError, OSError])  # of the store, of a file here
def test_a_store_that_is_away_for_a_moment_ends_nothing(bucket_run, kind):
    lease, said, calls = Lease(bucket_run / ".lock", LEASE_S), [], []
    lease.take(ignore)

    def upload():
        calls.append(1)
        if len(calls) == 1:
            raise kind("cannot write it: UNAVAILABLE")

    with kept(lease, upload, said.append):
        time.sleep(LEASE_S)
    assert said == ["cannot write it: UNAVAILABLE; trying again"] and len(calls) > 2
    assert not (bucket_run / ".lock").is_file()
