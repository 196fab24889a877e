# SPDX-License-Identifier: Apache-2.0
"""Paths in a bucket, without a server; `test_bucket_runs.py` has them with one."""

import pytest
import tensorstore as ts

from opsd_jax.errors import UserError
from opsd_jax.host.bucket import BucketError, BucketPath, told


def test_objects_below_a_path_are_its_own(bucket_run):
    (bucket_run / "a/b.txt").write("ü".encode())
    (bucket_run / "a" / "c").write(b"")
    BucketPath(f"{bucket_run}0/a/d").write(b"of another run")
    assert bucket_run.names() == ["a/b.txt", "a/c"] and (bucket_run / "a").names() == ["b.txt", "c"]
    assert (bucket_run / "a/b.txt").read_text() == "ü" and (bucket_run / "a/c").is_file()
    assert (
        not (bucket_run / "a").is_file()
        and (bucket_run / "a").exists()
        and not (bucket_run / "b").exists()
    )
    (bucket_run / "a").rename(bucket_run / "z")
    assert bucket_run.names() == ["z/b.txt", "z/c"]
    (bucket_run / "z/b.txt").unlink()
    (bucket_run / "z/b.txt").unlink()  # as often as one likes
    bucket_run.rmtree()
    assert bucket_run.names() == [] and BucketPath(f"{bucket_run}0").names() == ["a/d"]
    with pytest.raises(FileNotFoundError, match=f"no object {bucket_run}/z/c"):
        (bucket_run / "z/c").read_text()


def test_an_object_is_written_if_nobody_else_has(bucket_run):
    path = bucket_run / "x"
    _, absent = path.read()
    first = path.write_if(b"1", absent)
    assert first and path.write_if(b"2", absent) is None and path.read() == (b"1", first)
    second = path.write_if(b"3", first)
    assert path.read(unless=second) == (None, second) and path.read(unless=first)[0] == b"3"
    assert path.write_if(None, first) is None and path.is_file()
    with pytest.raises(ValueError, match="needs a version"):
        path.write_if(b"4", b"")
    path.write_if(None, second)
    assert not path.is_file()


@pytest.mark.parametrize(
    "url",
    ["gs://b", "gs://bucket", "gs://bucket/", "s3:///run", "s3://bucket/a//b", "s3://bucket/../b"],
)
def test_a_name_that_is_none_is_refused(url):
    with pytest.raises(UserError, match=f"must be {url[:2]}://BUCKET/RUN, not"):
        BucketPath(url)


def test_a_store_that_cannot_be_reached_is_not_a_missing_object(bucket_run):
    with (
        pytest.raises(BucketError, match="^cannot read it: PERMISSION_DENIED: no$"),
        told("read it"),
    ):
        raise ValueError("PERMISSION_DENIED: no [source locations='x.cc:1']")
    store = ts.open({"driver": "zarr3", "kvstore": bucket_run.spec()}, open=True)
    with pytest.raises(ValueError, match="^NOT_FOUND") as caught, told("read it", data_too=False):
        store.result()
    assert not isinstance(caught.value, BucketError)
