"""The torch side of the CUDA validation: `python -m engine.cuda_checks` writes its checks as one line of JSON.

The checks take torch as an argument, so that a double can stand in for it.
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from domain.peft.unsloth_rules import LEAST_CAPABILITY
from engine.guards import hide_broken_torchvision
from engine.lifeline import die_with_parent

_MIB = 2**20
_SIZE = 512
# A product of 512 × 512 standard normal matrices has entries of about √512 ≈ 23; fp32 with TF32 off rounds
# them by less than 1e-4, fp16 and bf16 results (11 and 8 bits of mantissa) by less than 0.1 and 1 a rounding.
_TOLERANCE = {"fp32": 1e-2, "fp16": 1.0, "bf16": 2.0}
# The mean error of NF4 on a standard normal is 0.073 (QLoRA, arXiv 2305.14314, appendix E: 4-bit NormalFloat).
_NF4_TOLERANCE = 0.1
# With less than this beside the CUDA context, only the smallest models train; hence a warning and no failure.
_ROOM_BYTES = 2048 * _MIB
_BF16_MAJOR = 8  # Ampere (CUDA programming guide, compute capabilities)
# The packages that Unsloth patches at run time. A version of them that it refuses breaks training, not just the import.
_UNSLOTH_NEEDS = ("unsloth_zoo", "torch", "transformers", "peft", "trl", "bitsandbytes", "triton", "xformers")
# The oldest driver for each CUDA. Source: CUDA Compatibility, "Minor Version Compatibility".
_LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
_ARCHITECTURE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>[af]?)")
_BUILD = "With a need of your own: install a build for this torch and CUDA of"
_OF_A_GPU = (
    "architecture",
    "matrix_product_fp32",
    "bf16",
    "bitsandbytes_4bit",
    "memory",
    "xformers",
    "flash_attn",
    "unsloth",
)
_REINSTALL = "Reinstall the package for this GPU and driver."
_FREE_MEMORY = "End other programs on the GPU; `nvidia-smi` lists them."

Check = dict[str, str | None]


def _check(name: str, status: str, detail: str, fix: str | None = None) -> Check:
    return {"name": name, "status": status, "detail": detail, "fix": fix}


def torch_build(torch: Any, environment: Mapping[str, str] = os.environ) -> Check:
    """Is torch built for CUDA, and does its CUDA start with this driver?"""
    name, build = "torch_build", f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return _check(name, "fail", f"{build} is not a CUDA build.", "pip install a CUDA build of torch.")
    if torch.cuda.is_available():
        return _check(name, "pass", f"{build}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU(s).")
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        detail = f"{build} sees no GPU, and CUDA_VISIBLE_DEVICES is {hidden!r}."
        return _check(name, "fail", detail, "Unset CUDA_VISIBLE_DEVICES, or name GPUs that are there.")
    detail = f"{build} (CUDA {torch.version.cuda}) cannot use this driver."
    return _check(name, "fail", detail, "Update the driver, or install a torch for its CUDA version.")


def driver_for_torch(torch: Any) -> Check:
    """Is the driver new enough for the CUDA that torch is built with?"""
    name, built = "driver_for_torch", _pair(torch.version.cuda or "")
    if built is None:
        return _check(name, "skip", f"torch {torch.__version__} is not a CUDA build.")
    known = int(torch._C._cuda_getDriverVersion())  # 12080 is CUDA 12.8; 0 where there is no driver
    driver = known // 1000, known % 1000 // 10
    detail = f"The driver supports CUDA {driver[0]}.{driver[1]}, and torch is built with {built[0]}.{built[1]}."
    if driver >= built:
        return _check(name, "pass", detail)
    least = _LEAST_DRIVER.get(built[0], "that of its release notes")
    fix = f"Update the NVIDIA driver to {least} or newer, or install a torch built with CUDA {driver[0]}."
    if driver[0] == built[0]:  # "minor version compatibility": all but code that the driver would have to compile
        return _check(name, "warn", f"{detail} Most of torch works; what is compiled at run time may not.", fix)
    return _check(name, "fail", detail, fix)


def architecture(torch: Any, index: int) -> Check:
    """Does torch's build hold code for this GPU?

    Code for one compute capability runs on every later one of the same major number; PTX is compiled by the driver for
    any later one. Source: CUDA C++ programming guide, "Application Compatibility"; the letters a and f: "Architecture-
    Specific Features", "Family-Specific Features".
    """
    name, major_minor = f"architecture_{index}", torch.cuda.get_device_capability(index)
    names = list(torch.cuda.get_arch_list())
    detail = f"Compute capability {major_minor[0]}.{major_minor[1]}; torch {torch.__version__} has {', '.join(names)}."
    built = [parts for parts in map(_ARCHITECTURE.fullmatch, names) if parts is not None]
    if any(_runs_on(parts, major_minor) for parts in built):
        return _check(name, "pass", detail)
    if any(parts["kind"] == "compute" and _numbers(parts) <= major_minor for parts in built):
        fix = "Install a torch built for this GPU: the driver compiles every kernel for it at its first use."
        return _check(name, "warn", detail, fix)
    newest = max((_numbers(parts) for parts in built), default=(0, 0))
    older = "an older torch: this one has dropped the GPU" if major_minor < newest else "a newer torch"
    fix = f"Install {older}, or a build of it with another CUDA, whose list has sm_{major_minor[0]}{major_minor[1]}."
    return _check(name, "fail", detail, fix)


def _runs_on(parts: re.Match[str], capability: tuple[int, int]) -> bool:
    """Whether machine code runs on a GPU: `a` on that one alone, the others on later ones of the same major number."""
    if parts["kind"] != "sm":
        return False
    built = _numbers(parts)
    if parts["only"] == "a":
        return built == capability
    return built[0] == capability[0] and built <= capability


def _numbers(parts: re.Match[str]) -> tuple[int, int]:
    return int(parts["major"]), int(parts["minor"])


def _pair(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor.partition(".")[0] or 0)) if major.isdigit() else None


def _load_xformers() -> None:
    """Load what is compiled of xformers, which fails with a torch that it was not built for."""
    from xformers._cpp_lib import _register_extensions

    _register_extensions()


def _load_flash_attn() -> None:
    """Load what is compiled of flash-attn, as above."""
    importlib.import_module("flash_attn_2_cuda")


def optional_kernels(
    torch: Any, package: str, load: Callable[[], None], installed: Callable[[str], str] = version
) -> Check:
    """Is a package with kernels of its own there, and built for this torch? Nothing here needs it.

    Args:
        package: Its name.
        load: Loads what is compiled of it.
        installed: Returns a package's version.
    """
    name = package.replace("-", "_")
    instead = "Models compute with torch's own attention, so nothing needs it"
    try:
        found = installed(package)
    except PackageNotFoundError:
        return _check(name, "warn", f"{package} is not installed. {instead}.", f"Nothing to do. {_BUILD} {package}.")
    try:
        load()
    except Exception as error:  # noqa: BLE001 - the package's own, whatever it is
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        detail = f"{package} {found} does not load with torch {torch.__version__}: {words}. {instead}."
        return _check(name, "warn", detail, f"pip uninstall {package}. {_BUILD} {package}.")
    return _check(name, "pass", f"{package} {found} loads with torch {torch.__version__}.")


def matrix_product(torch: Any, index: int, kind: str) -> Check:
    """Multiply on the GPU and compare with the CPU's answer in float64.

    Args:
        index: torch's number of the GPU.
        kind: fp32, fp16 or bf16.
    """
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    torch.set_float32_matmul_precision("highest")  # TF32 rounds to 10 bits: its error would hide a real one
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(_SIZE, _SIZE, generator=generator).to(dtype)
    right = torch.randn(_SIZE, _SIZE, generator=generator).to(dtype)
    expected = left.double() @ right.double()
    device = f"cuda:{index}"
    product = (left.to(device) @ right.to(device)).double().cpu()
    error = float((product - expected).abs().max())
    detail = f"Largest difference from the CPU's answer: {error:.2e}."
    if error <= _TOLERANCE[kind]:  # false for NaN too
        return _check(f"matrix_product_{kind}_{index}", "pass", detail)
    fix = "The GPU computes wrong results: check its memory (ECC errors), temperature and clocks."
    return _check(f"matrix_product_{kind}_{index}", "fail", detail, fix)


def bf16(torch: Any, index: int) -> Check:
    """Multiply in bfloat16, or in float16 where the GPU has no bfloat16."""
    major, minor = torch.cuda.get_device_capability(index)
    if major >= _BF16_MAJOR:
        return matrix_product(torch, index, "bf16") | {"name": f"bf16_{index}"}
    product = matrix_product(torch, index, "fp16") | {"name": f"bf16_{index}"}
    if product["status"] == "fail":
        return product
    detail = f"Compute capability {major}.{minor} has no bf16; fp16 works. {product['detail']}"
    return _check(f"bf16_{index}", "warn", detail, "Nothing to do: training uses fp16 here.")


def four_bit(torch: Any, index: int) -> Check:
    """Quantise a matrix to NF4 and back with bitsandbytes."""
    import bitsandbytes.functional as functional

    name = f"bitsandbytes_4bit_{index}"
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(f"cuda:{index}")
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((functional.dequantize_4bit(packed, state) - weight).abs().mean())
    detail = f"Mean error of NF4 on normal weights: {error:.3f}."
    if error < _NF4_TOLERANCE:
        return _check(name, "pass", detail)
    return _check(name, "fail", detail, "Reinstall bitsandbytes for this CUDA version.")


def free_memory(torch: Any, index: int) -> Check:
    """Is there room for a small model?"""
    free, total = torch.cuda.mem_get_info(index)
    detail = f"{free // _MIB} MiB of {total // _MIB} MiB free."
    enough = free >= _ROOM_BYTES
    return _check(f"memory_{index}", "pass" if enough else "warn", detail, None if enough else _FREE_MEMORY)


def unsloth_importable(torch: Any, installed: Callable[[str], str] = version) -> Check:
    """Import Unsloth where it can run, and compare the versions of what it patches with what it asks for."""
    instead = "models train with transformers + PEFT instead"
    try:
        unsloth_version = installed("unsloth")
    except PackageNotFoundError:
        return _check("unsloth", "skip", f"unsloth is not installed; {instead}.", "pip install unsloth")
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < LEAST_CAPABILITY:
        detail = f"Compute capability {best[0]}.{best[1]} is below Unsloth's 7.0; {instead}."
        return _check("unsloth", "skip", detail)
    import unsloth  # noqa: F401

    refused = refused_versions(requires("unsloth") or [], installed)
    if refused:
        detail = f"unsloth {unsloth_version} imports, but it asks for other versions: {'; '.join(refused)}."
        return _check("unsloth", "warn", detail, "pip install -r requirements.txt")
    return _check("unsloth", "pass", f"unsloth {unsloth_version} imports; what it needs is there.")


def refused_versions(requirements: list[str], installed: Callable[[str], str] = version) -> list[str]:
    """Name the packages that Unsloth patches whose installed version it does not accept.

    Args:
        requirements: As importlib.metadata gives them (PEP 508).
    """
    from packaging.requirements import Requirement

    refused = []
    for requirement in map(Requirement, requirements):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or requirement.name.lower().replace("-", "_") not in _UNSLOTH_NEEDS:
            continue
        try:
            version = installed(requirement.name)
        except PackageNotFoundError:
            refused.append(f"{requirement.name}{requirement.specifier} (not installed)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            refused.append(f"{requirement.name}{requirement.specifier} (installed: {version})")
    return refused


def guarded(name: str, check: Callable[..., Check], *arguments: Any) -> Check:
    """Run a check. If it raises, the error is its result."""
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001 - any failure of a check is that check's result
        fix = _FREE_MEMORY if type(error).__name__ == "OutOfMemoryError" else _REINSTALL
        return _check(name, "fail", f"{type(error).__name__}: {error}", fix)


def run(torch: Any) -> list[Check]:
    """Run every check; those that need a GPU are skipped where torch has none."""
    checks = [guarded("torch_build", torch_build, torch), guarded("driver_for_torch", driver_for_torch, torch)]
    if checks[0]["status"] == "fail":
        return [*checks, *(_check(name, "skip", "Not run: torch cannot use a GPU.") for name in _OF_A_GPU)]
    for index in range(torch.cuda.device_count()):
        checks.append(guarded(f"architecture_{index}", architecture, torch, index))
        checks.append(guarded(f"memory_{index}", free_memory, torch, index))
        checks.append(guarded(f"matrix_product_fp32_{index}", matrix_product, torch, index, "fp32"))
        checks.append(guarded(f"bf16_{index}", bf16, torch, index))
        checks.append(guarded(f"bitsandbytes_4bit_{index}", four_bit, torch, index))
    checks.append(guarded("xformers", optional_kernels, torch, "xformers", _load_xformers))
    checks.append(guarded("flash_attn", optional_kernels, torch, "flash-attn", _load_flash_attn))
    checks.append(guarded("unsloth", unsloth_importable, torch))  # last: importing it patches torch
    return checks


def run_here() -> list[Check]:
    """Import torch and run every check; a torch that does not import is the first check's failure."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        detail = f"torch does not import: {type(error).__name__}: {error}"
        return [_check("torch_build", "fail", detail, "pip install a CUDA build of torch.")]
    return run(torch)


def main() -> None:
    """Write the checks to the pipe that the environment names, or to stdout."""
    if "PEFT_STUDIO_PARENT_PID" in os.environ:
        die_with_parent(int(os.environ["PEFT_STUDIO_PARENT_PID"]))
    given = os.environ.get("PEFT_STUDIO_RESULT_FD")
    descriptor = int(given) if given is not None else os.dup(sys.stdout.fileno())
    os.set_inheritable(descriptor, False)  # a library's own subprocess must not hold the pipe open
    if hide_broken_torchvision():
        os.environ["UNSLOTH_SKIP_TORCHVISION_CHECK"] = "1"  # as the engine does; text models need none
    document = json.dumps(run_here()) + "\n"
    with os.fdopen(descriptor, "w") as results:
        results.write(document)


if __name__ == "__main__":
    main()
