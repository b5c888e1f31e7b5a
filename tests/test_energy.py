"""Joules of a device that counts them, and of one that does not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import Ledger, Rates
from thrifty.signals.energy import energy_counter


@pytest.fixture
def nvml(monkeypatch):
    """Two GPUs, each at a number of millijoules."""
    used = {0: 5_000, 1: 7_000}
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(used),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=used.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return used


def test_what_the_devices_count(nvml):
    counter = energy_counter()
    assert counter() == 12.0
    nvml[1] += 500
    assert counter() == 12.5


def test_nobody_counts(monkeypatch, nvml):
    nvml.clear()
    assert energy_counter() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter() is None


def test_measured_joules_are_charged_and_limited(nvml, tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, Budget(flops=1e9), Rates(watts=1e6)) as ledger:
        ledger.energy = energy_counter()
        with ledger.stage("train", "full") as stage:
            with stage.spending("train", Cost(flops=10.0)) as lease:
                lease.tick(Cost(flops=10.0), steps=1)
                nvml[0] += 2_500
            assert stage.spent().joules == 2.5
            ledger.energy = None
            with stage.spending("train", Cost(flops=10.0)) as lease:
                lease.tick(Cost(flops=10.0), steps=1)
            assert stage.spent().joules > 2.5
