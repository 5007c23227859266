"""The torch side of the CUDA validation, with a torch whose GPUs are the CPU under another name."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import cuda_checks
from engine.guards import hide_broken_torchvision

BACKEND = Path(cuda_checks.__file__).resolve().parent.parent
GIB = 2**30
_to = torch.Tensor.to


class FakeCuda:
    """torch.cuda for `count` GPUs of one kind."""

    def __init__(
        self,
        count: int = 2,
        capability: tuple[int, int] = (9, 0),
        free: int = 60 * GIB,
        architectures: tuple[str, ...] = ("sm_75", "sm_80", "sm_90"),
    ) -> None:
        self.count, self.capability, self.free, self.architectures = count, capability, free, architectures

    def get_arch_list(self) -> list[str]:
        return list(self.architectures)

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def get_device_capability(self, index: int) -> tuple[int, int]:
        assert 0 <= index < self.count
        return self.capability

    def mem_get_info(self, index: int) -> tuple[int, int]:
        assert 0 <= index < self.count
        return self.free, 80 * GIB


class Version(NamedTuple):
    """What torch was built for."""

    cuda: str | None


class Driver:
    """torch's own way to ask the driver which CUDA it supports."""

    def __init__(self, version: int) -> None:
        self._version = version

    def _cuda_getDriverVersion(self) -> int:
        return self._version


class FakeTorch:
    """torch with a GPU."""

    def __init__(self, cuda: FakeCuda | None = None, built_for: str | None = "12.8", driver: int = 13000) -> None:
        self.cuda = cuda or FakeCuda()
        self._C = Driver(driver)
        self.version = Version(built_for)
        self.__version__ = "2.13.0+cu128"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let tensors go to `cuda:N`; a function put into the list is applied to each that does."""
    functions: list[Any] = []

    def to(tensor: torch.Tensor, target: Any, **options: Any) -> torch.Tensor:
        if not (isinstance(target, str) and target.startswith("cuda:")):
            return _to(tensor, target, **options)
        for function in functions:
            tensor = function(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    yield functions


def by_name(checks: list[cuda_checks.Check]) -> dict[str | None, cuda_checks.Check]:
    return {check["name"]: check for check in checks}


def statuses(checks: list[cuda_checks.Check]) -> dict[str | None, str | None]:
    return {check["name"]: check["status"] for check in checks}


def test_a_build_that_starts_passes() -> None:
    check = cuda_checks.torch_build(FakeTorch(), {})
    assert check["status"] == "pass" and "2 GPU" in (check["detail"] or "")


@pytest.mark.parametrize(
    ("fake", "environment", "words"),
    [
        (FakeTorch(built_for=None), {}, "not a CUDA build"),
        (FakeTorch(FakeCuda(0)), {}, "cannot use this driver"),
        (FakeTorch(FakeCuda(0)), {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is ''"),
    ],
)
def test_a_build_that_does_not_start_says_why(fake: Any, environment: dict[str, str], words: str) -> None:
    check = cuda_checks.torch_build(fake, environment)
    assert check["status"] == "fail" and words in (check["detail"] or "") and check["fix"]


def test_without_a_gpu_the_other_checks_are_skipped_by_name() -> None:
    found = statuses(cuda_checks.run(FakeTorch(FakeCuda(0), driver=12040)))
    assert (found.pop("torch_build"), found.pop("driver_for_torch")) == ("fail", "warn")
    names = ["matrix_product_fp32", "bf16", "bitsandbytes_4bit", "memory", "unsloth", "architecture"]
    assert found == dict.fromkeys([*names, "xformers", "flash_attn"], "skip")


@pytest.mark.parametrize(
    ("built_for", "driver", "status", "fix"),
    [
        ("12.8", 12080, "pass", None),
        ("12.8", 13000, "pass", None),
        ("12.8", 12040, "warn", "525.60.13"),  # the same major number: most of it works
        ("13.0", 12080, "fail", "580.65.06"),
        ("13.0", 11040, "fail", "a torch built with CUDA 11"),
        ("14.1", 13000, "fail", "its release notes"),
        ("12", 12000, "pass", None),
        (None, 12080, "skip", None),
    ],
)
def test_a_driver_older_than_torchs_cuda_is_told_which_it_takes(
    built_for: str | None, driver: int, status: str, fix: str | None
) -> None:
    check = cuda_checks.driver_for_torch(FakeTorch(built_for=built_for, driver=driver))
    assert check["status"] == status
    assert fix in (check["fix"] or "") if fix is not None else check["fix"] is None


def test_too_old_a_driver_is_told_beside_the_torch_that_does_not_start() -> None:
    checks = by_name(cuda_checks.run(FakeTorch(FakeCuda(0), "13.0", 12020)))
    assert checks["torch_build"]["status"] == checks["driver_for_torch"]["status"] == "fail"
    assert "12.2" in (checks["driver_for_torch"]["detail"] or "")


@pytest.mark.parametrize(
    ("capability", "architectures", "status", "fix"),
    [
        ((9, 0), ("sm_80", "sm_90"), "pass", None),
        ((8, 9), ("sm_80", "sm_90"), "pass", None),  # code for 8.0 runs on all of 8
        ((12, 1), ("sm_90", "sm_120"), "pass", None),
        ((12, 0), ("sm_80", "sm_90"), "fail", "a newer torch"),
        ((12, 0), ("sm_80", "sm_90", "compute_90"), "warn", "compiles every kernel"),
        ((8, 0), ("sm_86", "sm_90", "compute_90"), "fail", "sm_80"),
        ((6, 1), ("sm_75", "sm_80"), "fail", "an older torch"),
        ((10, 3), ("sm_100a",), "fail", "sm_103"),
        ((10, 0), ("sm_100a",), "pass", None),
        ((10, 3), ("sm_100f",), "pass", None),
        ((9, 0), (), "fail", "sm_90"),
    ],
)
def test_a_gpu_that_torchs_build_does_not_know_is_told_what_to_install(
    capability: tuple[int, int], architectures: tuple[str, ...], status: str, fix: str | None
) -> None:
    check = cuda_checks.architecture(FakeTorch(FakeCuda(1, capability, architectures=architectures)), 0)
    assert (check["name"], check["status"]) == ("architecture_0", status)
    assert fix in (check["fix"] or "") if fix is not None else check["fix"] is None


def _fails() -> None:
    raise ImportError("undefined symbol:\n  _ZN3c104cuda9SetDeviceEi")


@pytest.mark.parametrize(
    ("package", "versions", "load", "status", "words"),
    [
        ("xformers", {"xformers": "0.0.32"}, lambda: None, "pass", "0.0.32 loads"),
        ("xformers", {}, _fails, "warn", "not installed"),
        ("flash-attn", {"flash-attn": "2.8"}, _fails, "warn", "undefined symbol: _ZN3c10"),
    ],
)
def test_kernels_that_are_missing_or_built_for_another_torch_are_no_failure(
    package: str, versions: dict[str, str], load: Any, status: str, words: str
) -> None:
    check = cuda_checks.optional_kernels(FakeTorch(), package, load, TestUnsloth.versions(**versions))
    assert check["status"] == status and words in (check["detail"] or "")
    if status == "warn":
        assert "nothing needs it" in (check["detail"] or "") and package in (check["fix"] or "")


def test_the_installed_xformers_is_really_loaded() -> None:
    """This machine's torch is not the one that it was built for, or it is: the check says which."""
    pytest.importorskip("xformers")
    check = cuda_checks.optional_kernels(torch, "xformers", cuda_checks._load_xformers)
    from xformers._cpp_lib import _build_metadata

    fits = _build_metadata is not None and _build_metadata.torch_version == torch.__version__
    assert (check["status"] == "pass") == fits


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_a_right_product_passes(spoil: list[Any], kind: str) -> None:
    check = cuda_checks.matrix_product(FakeTorch(), 1, kind)
    assert (check["name"], check["status"], check["fix"]) == (f"matrix_product_{kind}_1", "pass", None)


def one_entry_lost(tensor: torch.Tensor) -> torch.Tensor:
    damaged = tensor.clone()
    damaged[3, 5] += 8
    return damaged


DAMAGE = [one_entry_lost, torch.zeros_like, lambda t: t * float("nan"), lambda t: t.transpose(0, 1)]


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_product_fails(spoil: list[Any], kind: str, damage: Any) -> None:
    spoil.append(damage)
    check = cuda_checks.matrix_product(FakeTorch(), 0, kind)
    assert check["status"] == "fail" and check["fix"]


def test_a_gpu_without_bf16_is_warned_about_and_fp16_is_tried(spoil: list[Any]) -> None:
    old = FakeTorch(FakeCuda(1, (7, 5)))
    check = cuda_checks.bf16(old, 0)
    assert (check["name"], check["status"]) == ("bf16_0", "warn") and "fp16 works" in (check["detail"] or "")
    spoil.append(torch.zeros_like)
    assert cuda_checks.bf16(old, 0)["status"] == "fail"
    spoil.clear()
    check = cuda_checks.bf16(FakeTorch(), 0)
    assert (check["name"], check["status"]) == ("bf16_0", "pass")


def test_four_bit_is_really_quantised(spoil: list[Any]) -> None:
    assert cuda_checks.four_bit(FakeTorch(), 0)["status"] == "pass"


def test_four_bit_that_loses_the_weights_fails(monkeypatch: pytest.MonkeyPatch, spoil: list[Any]) -> None:
    import bitsandbytes.functional as functional

    monkeypatch.setattr(functional, "dequantize_4bit", lambda *_: torch.zeros(256, 256))
    check = cuda_checks.four_bit(FakeTorch(), 0)
    assert check["status"] == "fail" and check["fix"]


@given(st.integers(0, 80 * GIB), st.integers(0, 80 * GIB))
def test_more_free_memory_is_never_a_worse_answer(one: int, other: int) -> None:
    order = {"pass": 1, "warn": 0}
    less, more = sorted((one, other))
    checks = [cuda_checks.free_memory(FakeTorch(FakeCuda(free=free)), 0) for free in (less, more)]
    assert order[str(checks[0]["status"])] <= order[str(checks[1]["status"])]


def test_a_full_gpu_is_told_how_to_get_memory() -> None:
    check = cuda_checks.free_memory(FakeTorch(FakeCuda(free=100 * 2**20)), 0)
    assert check["status"] == "warn" and "100 MiB" in (check["detail"] or "")
    assert "nvidia-smi" in (check["fix"] or "")


def test_what_a_check_raises_is_its_answer() -> None:
    def out_of_memory() -> cuda_checks.Check:
        raise torch.OutOfMemoryError("tried to allocate 2 MiB")

    def no_kernel() -> cuda_checks.Check:
        raise RuntimeError("no kernel image is available")

    full, broken = cuda_checks.guarded("a", out_of_memory), cuda_checks.guarded("b", no_kernel)
    assert full["status"] == broken["status"] == "fail"
    assert "End other programs" in (full["fix"] or "")
    assert broken["detail"] == "RuntimeError: no kernel image is available"


class TestUnsloth:
    """Absent, too new for the GPU, importable, at odds with what is installed."""

    @pytest.fixture(autouse=True)
    def fake_unsloth(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
        monkeypatch.setattr(cuda_checks, "requires", lambda _: ["trl<=1.15.0", "peft>=0.18.0"])

    @staticmethod
    def versions(**found: str) -> Any:
        def installed(name: str) -> str:
            if name not in found:
                raise PackageNotFoundError(name)
            return found[name]

        return installed

    def test_absent_is_no_failure(self) -> None:
        check = cuda_checks.unsloth_importable(FakeTorch(), self.versions())
        assert check["status"] == "skip" and "transformers" in (check["detail"] or "")

    def test_an_old_gpu_is_no_failure(self) -> None:
        old = FakeTorch(FakeCuda(1, (6, 1)))
        check = cuda_checks.unsloth_importable(old, self.versions(unsloth="1"))
        assert check["status"] == "skip" and "6.1" in (check["detail"] or "")

    def test_importable_with_what_it_asks_for(self) -> None:
        versions = self.versions(unsloth="1", trl="1.14.2", peft="0.21.2")
        assert cuda_checks.unsloth_importable(FakeTorch(), versions)["status"] == "pass"

    def test_other_versions_are_named(self) -> None:
        check = cuda_checks.unsloth_importable(FakeTorch(), self.versions(unsloth="1", trl="1.16.0"))
        assert check["status"] == "warn" and check["fix"]
        assert "trl<=1.15.0 (installed: 1.16.0)" in (check["detail"] or "")
        assert "peft>=0.18.0 (not installed)" in (check["detail"] or "")

    def test_one_that_does_not_import_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "unsloth", None)
        versions = self.versions(unsloth="1")
        check = cuda_checks.guarded("unsloth", cuda_checks.unsloth_importable, FakeTorch(), versions)
        assert check["status"] == "fail" and "unsloth" in (check["detail"] or "") and check["fix"]


@pytest.mark.parametrize(
    ("requirement", "refused"),
    [
        ("trl<=1.15.0", False),
        ("trl>1.15.0", True),
        ("trl>1.15.0; sys_platform == 'nowhere'", False),
        ("trl>1.15.0; extra == 'studio'", False),
        ("torch<2.15.0,>=2.4.0", False),  # the local part of 2.13.0+cu128 says nothing about the version
        ("torch<2.13.0", True),
        ("fastapi==0.1", False),  # not what Unsloth patches
        ("unsloth_zoo>=2", True),
    ],
)
def test_requirements_are_read_as_pip_reads_them(requirement: str, refused: bool) -> None:
    found = {"trl": "1.14.2", "torch": "2.13.0+cu128", "fastapi": "0.165.0", "unsloth_zoo": "1"}
    assert bool(cuda_checks.refused_versions([requirement], found.__getitem__)) == refused


def test_the_installed_unsloth_accepts_what_is_installed_beside_it() -> None:
    from importlib.metadata import requires

    assert cuda_checks.refused_versions(requires("unsloth") or []) == []


def test_every_gpu_is_checked_and_unsloth_last(spoil: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    checks = cuda_checks.run(FakeTorch())
    per_gpu = [f"{name}_{index}" for index in (0, 1) for name in ("memory", "matrix_product_fp32", "bf16")]
    assert set(per_gpu) <= set(by_name(checks))
    assert {"bitsandbytes_4bit_0", "bitsandbytes_4bit_1"} <= set(by_name(checks))
    assert checks[0]["name"] == "torch_build" and checks[-1]["name"] == "unsloth"
    assert {"architecture_0", "architecture_1", "driver_for_torch"} <= set(by_name(checks))
    others = {name: status for name, status in statuses(checks).items() if name not in ("xformers", "flash_attn")}
    assert set(others.values()) == {"pass"} and "fail" not in statuses(checks).values()


def test_a_torch_that_does_not_import_is_the_first_checks_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (check,) = cuda_checks.run_here()
    assert (check["name"], check["status"]) == ("torch_build", "fail") and check["fix"]


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
def test_the_module_runs_alone_and_writes_one_document() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEFT_STUDIO_")}
    done = subprocess.run(
        [sys.executable, "-m", "engine.cuda_checks"],
        cwd=BACKEND,
        env=environment,
        capture_output=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)
    assert all(set(check) == {"name", "status", "detail", "fix"} for check in checks)
    assert by_name(checks)["torch_build"]["status"] == "fail"


@pytest.mark.gpu
def test_a_real_gpu_passes() -> None:
    checks = cuda_checks.run_here()
    assert "fail" not in statuses(checks).values(), checks


class TestBrokenTorchvision:
    """A torchvision that does not match torch is hidden; one that loads is left alone."""

    @pytest.fixture(autouse=True)
    def own_modules(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        held = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
        for name in held:
            del sys.modules[name]
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "torchvision").mkdir()
        self.package = tmp_path / "torchvision" / "__init__.py"
        (tmp_path / "torchvision" / "part.py").write_text("")
        yield
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(held)

    @pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::nms is missing')", "OSError('.so')"])
    def test_a_broken_one_is_hidden_with_its_parts(self, error: str) -> None:
        self.package.write_text(f"import torchvision.part\nraise {error}\n")
        assert hide_broken_torchvision()
        assert sys.modules["torchvision"] is None
        assert "torchvision.part" not in sys.modules
        with pytest.raises(ImportError):
            import torchvision  # noqa: F401
        assert hide_broken_torchvision()  # again: still hidden

    def test_one_that_loads_stays(self) -> None:
        self.package.write_text("")
        assert not hide_broken_torchvision()
        assert sys.modules["torchvision"].__file__ == str(self.package)
