"""`brainldm doctor`: nothing wrong here, and what is wrong is said."""

from __future__ import annotations

import json

import pytest

from brainldm.base.errors import EnvironmentProblem
from brainldm.cli import app
from brainldm.model import machine


def doctor() -> None:
    app(["doctor", "--json"], result_action="return_value")


def test_a_fit_machine_has_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    doctor()
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert 0 < found["convolution_relative_error"]["fp32"] < found["convolution_relative_error"]["bf16"]


def test_a_wrong_convolution_and_an_old_package_are_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, whole = machine._version, machine.F.conv3d
    monkeypatch.setattr(machine, "_version", lambda name: "1.6.0" if name == "monai" else right(name))
    monkeypatch.setattr(
        machine.F, "conv3d", lambda x, *rest, **more: whole(x, *rest, **more) * (1.1 if x.element_size() == 2 else 1)
    )
    with pytest.raises(EnvironmentProblem):
        doctor()
    old, wrong = json.loads(capsys.readouterr().out)["problems"]
    assert old.startswith("monai 1.6.0 is older than 1.6.1")
    assert wrong.startswith("a 3-D convolution in bf16 on cpu is off by 0.1 ")
