"""The meter: counters that wrap, GPUs by their UUID, and a reason wherever there is no energy to read."""

import sys
import types

import pytest
import torch

from sparselottery.training import energy
from sparselottery.training.energy import Meter


def rapl(folder, *counts, wrap=1000):
    for i, count in enumerate(counts):
        package = folder / f"intel-rapl:{i}"
        package.mkdir(exist_ok=True)
        (package / "fresh").write_text(f"{int(count * 1e6)}\n")
        (package / "fresh").replace(package / "energy_uj")  # a reader sees whole numbers, as in sysfs
        (package / "max_energy_range_uj").write_text(f"{int(wrap * 1e6)}\n")


def test_rapl_sums_the_packages_and_goes_over_the_wrap(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    rapl(tmp_path, 10, 990)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0: counted there
    with Meter() as meter:
        rapl(tmp_path, 15, 998)
        assert meter.read()["joules"] == pytest.approx(13)
        rapl(tmp_path, 15, 7)
        found = meter.read()
    assert found["joules"] == pytest.approx(13 + 9) and found["seconds"] > 0
    assert meter.source == "RAPL, CPU packages" and meter.why_not is None


def test_energy_counts_from_when_the_meter_is_entered(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    rapl(tmp_path, 1)
    meter = Meter()
    rapl(tmp_path, 100)
    with meter:
        rapl(tmp_path, 102)
        assert meter.read()["joules"] == pytest.approx(2)


def test_counters_are_looked_at_often_enough_to_see_every_wrap(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(energy, "SAMPLE", 0.005)
    rapl(tmp_path, 900)
    with Meter() as meter:
        for count, used in ((100, 200), (900, 1000), (100, 1200)):  # twice over the wrap without a read
            rapl(tmp_path, count)
            for _ in range(2000):
                if meter._used == pytest.approx(used):
                    break
                meter._stop.wait(0.005)
        assert meter.read()["joules"] == pytest.approx(1200)


def test_a_reason_is_told_where_there_is_no_meter(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    with Meter() as meter:
        assert meter.read()["joules"] is None
    assert meter.source is None and "no energy counters of its CPU" in meter.why_not
    rapl(tmp_path, 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("nothing")
    assert "cannot be read" in Meter().why_not
    assert Meter(energy=False, why_not="several at once").why_not == "several at once"
    assert Meter("meta").why_not == "no energy meter is known for meta"


class FakeNvml(types.ModuleType):
    class NVMLError(Exception):
        pass

    joules, failing = 5.0, False

    def nvmlInit(self):
        if self.failing:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "GPU-12ab"
        return int(self.joules * 1000)  # millijoules


def test_nvml_reads_the_gpu_that_torch_means(monkeypatch):
    nvml = FakeNvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = types.SimpleNamespace(uuid="12ab", name="H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with Meter("cuda") as meter:
        nvml.joules = 12.5
        assert meter.read()["joules"] == pytest.approx(7.5)
    assert meter.source == "NVML, H200" and len(waited) == 2  # work that is only queued has cost nothing yet
    nvml.failing = True
    assert Meter("cuda").why_not == "NVML cannot read this GPU's energy (Driver Not Loaded)"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'sparselottery[energy]'" in Meter("cuda").why_not
