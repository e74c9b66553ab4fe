"""The doctor's check of a device: a training step beside the CPU's. Here the device is the CPU, with faults."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from bardlet import doctor
from bardlet.cli import main
from bardlet.runtime import device as runtime_device
from bardlet.training import device_check, losses

CPU = torch.device("cpu")
Loss = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]


def with_fault(fault: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second step of each model, that of the device, compute its loss with `fault`."""
    original, calls = losses.next_token_loss, 0

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(model, batch) if calls % 2 else fault(model, batch)

    monkeypatch.setattr(device_check.losses, "next_token_loss", loss)


def scaled(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss that is wrong by a thousandth."""
    return model(batch["idx"], batch["target"]) * 1.001


def one_gradient(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A right loss, and a gradient of one parameter that is wrong by a twentieth."""
    name, parameter = list(model.named_parameters())[-1]
    parameter.register_hook(lambda grad: grad * 1.05)
    return model(batch["idx"], batch["target"])


def transposed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A gradient in the wrong memory layout, as of non-contiguous tensors on an Apple GPU."""
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
            parameter.register_hook(lambda grad: grad.t().contiguous())
    return model(batch["idx"], batch["target"])


def not_a_number(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["idx"], batch["target"]) * float("nan")


def missing(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    raise NotImplementedError("The operator 'aten::_x' is not currently implemented for\nthe MPS device")


def test_a_device_that_computes_as_the_cpu_is_ok() -> None:
    """The CPU beside itself: the same bits."""
    assert [(each.loss, each.gradient) for each in device_check.compare_with_cpu(CPU)] == [(0.0, 0.0)] * 2
    finding = doctor.check_device(CPU)
    assert finding.verdict == "ok" and "agrees with the CPU's: loss 0.0e+00, gradient of" in finding.message


def test_rounding_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order differ by about 1e-6."""
    with_fault(lambda model, batch: model(batch["idx"], batch["target"]) * (1 + 2e-6), monkeypatch)
    assert all(each.ok and 1e-7 < each.loss < 1e-5 for each in device_check.compare_with_cpu(CPU))


@pytest.mark.parametrize(("fault", "message"), [
    (scaled, "differs from the CPU's: loss 1.0e-03, gradient of"), (one_gradient, "5.0e-02 (relative, "),
    (transposed, "differs from the CPU's: loss 0.0e+00, gradient of "), (not_a_number, "loss nan, gradient of every"),
    (missing, "fails on cpu: The operator 'aten::_x' is not currently implemented for the MPS device; train with"),
])  # fmt: skip
def test_a_wrong_device_is_a_warning(fault: Loss, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_fault(fault, monkeypatch)
    finding = doctor.check_device(CPU)
    assert finding.verdict == "warning" and message in finding.message and "--device cpu" in finding.message


def test_the_doctor_checks_each_accelerator(monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """None on a machine without a GPU; the check leaves the random state as it was."""
    monkeypatch.setattr(runtime_device, "accelerators", lambda: [CPU])
    before = torch.get_rng_state()
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert [each["verdict"] for each in findings if "training step" in each["said"]] == ["ok"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("cuda", "mps", "expected"), [
    (False, False, []), (True, False, ["cuda"]), (False, True, ["mps"]), (True, True, ["cuda", "mps"])])
def test_accelerators(cuda: bool, mps: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert [device.type for device in runtime_device.accelerators()] == expected
