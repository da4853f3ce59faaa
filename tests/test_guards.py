"""The guards around all other tests are awake (conftest.py)."""

from __future__ import annotations

import socket
import urllib.request

import pytest
import torch


def test_no_other_machine_is_reached() -> None:
    with pytest.raises(pytest.fail.Exception, match="address of 'example"):
        urllib.request.urlopen("http://example.org", timeout=1)
    with socket.socket() as apart, pytest.raises(pytest.fail.Exception, match="connection"):
        apart.connect(("192.0.2.1", 80))


def test_this_one_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()


def test_no_gpu_is_seen_where_no_test_of_one_runs(request: pytest.FixtureRequest) -> None:
    if any(item.get_closest_marker("gpu") for item in request.session.items):
        pytest.skip("tests of a GPU run beside this one")
    assert not torch.cuda.is_available()
