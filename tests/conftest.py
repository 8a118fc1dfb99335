"""Fixtures that more than one room uses."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import hypothesis
import jaxtyping
import pytest
from flaky_s3 import FlakyS3
from hub_server import Hub

# Shared machines stall for seconds; how long an example takes says nothing here.
hypothesis.settings.register_profile("bitray", deadline=None)
hypothesis.settings.load_profile("bitray")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server of our own on loopback; started by the first test that asks."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, `s3://...`, for this process and its children."""
    for name, value in _account(s3_server).items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    _client(s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types and shapes are not checked at run time: such checks cannot be compiled, and forbid some
    of what users may do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def proxy(s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyS3]:
    """What lies between a test, its children included, and the S3 server; it can fail."""
    proxy = FlakyS3(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    yield proxy
    proxy.close()


def _account(server: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _client(server: str) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=server,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hugging Face Hub of our own on loopback, for this process; it holds nothing yet."""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    yield server
    server.close()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A small Ray of our own for all tests that ask; its folder is short, for the sockets in it."""
    import ray

    folder = tempfile.mkdtemp(prefix="br", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300_000_000,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
        _system_config={"metrics_report_interval_ms": 2000},  # gauges come, and go, soon
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
