"""`sparselottery env`: what is there, what is missing and why."""

import json
import os
import pwd
import tempfile
import types

import pytest
import torch

from sparselottery import _ext, kernels


def test_report_is_json_and_says_what_is_there():
    report = json.loads(json.dumps(_ext.env_report()))
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["sparselottery"] == _ext.package_version("sparselottery") is not None
    assert report["cpu"]["threads"] == torch.get_num_threads() and report["cpu"]["cores"] >= 1
    assert report["build"]["extension"] is True and report["build"]["why_not"] is None
    text = _ext.format_env(report)
    assert torch.__version__ in text and report["cpu"]["model"] in text


def test_missing_extension_and_triton_are_said_with_reason_and_remedy(monkeypatch):
    monkeypatch.setattr(_ext, "_C", None)
    monkeypatch.setattr(_ext, "WHY_NOT", "cannot open shared object file")
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    monkeypatch.setattr(kernels, "WHY_NOT", "ModuleNotFoundError: No module named 'triton'")
    report = _ext.env_report()
    missing = {item["what"]: item for item in report["missing"]}
    assert missing["compiled kernels"]["why"] == "cannot open shared object file"
    assert "pip install" in missing["compiled kernels"]["do"]
    assert "triton" in missing["Triton kernels"]["why"]
    text = _ext.format_env(report)
    assert "missing: compiled kernels" in text and "why: cannot open shared object file" in text
    with pytest.raises(RuntimeError, match=r"could not be loaded \(cannot open.*pip install"):
        _ext.extension()


def gpu_machine(monkeypatch, archs, capability=(9, 0)):
    device = types.SimpleNamespace(name="GPU", major=capability[0], minor=capability[1], total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(_ext, "_C", types.SimpleNamespace(cuda_archs=archs))
    return _ext.env_report()


def test_gpu_with_cpu_only_build(monkeypatch):
    report = gpu_machine(monkeypatch, archs=None)
    assert report["gpu"]["devices"] == [{"name": "GPU", "capability": "90", "memory_gib": 16.0}]
    assert [m["why"] for m in report["missing"] if m["what"] == "CUDA kernels"] == [
        "the extension was built without nvcc"
    ]


def test_gpu_older_than_the_build(monkeypatch):
    report = gpu_machine(monkeypatch, archs="80;90", capability=(7, 5))
    assert "SPARSELOTTERY_CUDA_ARCHS='75;80;90'" in next(m["do"] for m in report["missing"])


def test_gpu_and_fitting_build_miss_nothing(monkeypatch):
    report = gpu_machine(monkeypatch, archs="80;90", capability=(10, 0))
    assert report["missing"] == [] and "nothing is missing" in _ext.format_env(report)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    assert _ext.cache_dir() == tmp_path
    assert _ext.env_report()["settings"]["SPARSELOTTERY_CACHE"] == str(tmp_path)
    monkeypatch.delenv("SPARSELOTTERY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _ext.cache_dir() == tmp_path / "xdg" / "sparselottery"


def test_cache_dir_expands_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPARSELOTTERY_CACHE", "~/x")
    assert _ext.cache_dir() == tmp_path / "x"


@pytest.mark.parametrize("chosen", ["", "~/x"])
@pytest.mark.parametrize("taken", ["no", "by somebody's link"])
def test_cache_dir_without_a_home_is_a_private_temporary_one(monkeypatch, tmp_path, chosen, taken):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPARSELOTTERY_CACHE", chosen)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = tmp_path / f"sparselottery-{os.getuid()}"
    if taken != "no":
        (tmp_path / "elsewhere").mkdir()
        expected.symlink_to(tmp_path / "elsewhere")
    _ext._temporary_dir.cache_clear()
    try:
        path = _ext.cache_dir()
        assert path == _ext.cache_dir() and path.parent == tmp_path and (path == expected) == (taken == "no")
        assert path.is_dir() and not path.is_symlink() and path.stat().st_mode & 0o77 == 0
    finally:
        _ext._temporary_dir.cache_clear()


@pytest.mark.parametrize("version", ["2.5.1+cu121", "1.13.0", "2.5.0a0+git123"])
def test_old_torch_is_refused_in_one_line(version):
    with pytest.raises(ImportError, match=r"needs torch >= 2\.6, found .*: pip install") as error:
        _ext.check_torch(version)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", ["2.6.0", "2.11.0+cu130", "2.13.0+cpu", "3.0.0", "main"])
def test_new_torch_passes(version):
    assert _ext.check_torch(version) is None
