"""The torch side of the CUDA validation: `python -m engine.cuda_checks` writes its checks as JSON."""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from engine.guards import hide_broken_torchvision

_MIB = 2**20
_SIZE = 512
# A product of 512 × 512 standard normal matrices has entries of about √512 ≈ 23; fp32 with TF32 off rounds
# them by less than 1e-4, bf16 inputs (8 bits of mantissa) by less than 1.
_TOLERANCE = {"fp32": 1e-2, "bf16": 2.0}

Check = dict[str, str | None]


def _check(name: str, status: str, detail: str, fix: str | None = None) -> Check:
    return {"name": name, "status": status, "detail": detail, "fix": fix}


def torch_build(torch: Any) -> Check:
    """Is torch built for CUDA, and does its CUDA start with this driver?"""
    if torch.version.cuda is None:
        fix = "pip install a CUDA build of torch"
        return _check("torch_build", "fail", f"torch {torch.__version__} is a CPU build.", fix)
    if not torch.cuda.is_available():
        detail = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this driver."
        return _check("torch_build", "fail", detail, "Update the driver, or install a torch for its CUDA version.")
    return _check("torch_build", "pass", f"torch {torch.__version__}, CUDA {torch.version.cuda}.")


def matrix_product(torch: Any, index: int, kind: str) -> Check:
    """Multiply on the GPU and compare with the CPU's answer in float64."""
    name = f"matrix_product_{kind}_{index}"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(_SIZE, _SIZE, generator=generator).to(dtype)
    right = torch.randn(_SIZE, _SIZE, generator=generator).to(dtype)
    expected = left.double() @ right.double()
    device = f"cuda:{index}"
    found = (left.to(device) @ right.to(device)).double().cpu()
    error = float((found - expected).abs().max())
    status = "pass" if error <= _TOLERANCE[kind] else "fail"
    fix = None if status == "pass" else "The GPU computes wrong results: check its memory and clocks."
    return _check(name, status, f"Largest difference from the CPU's answer: {error:.2e}.", fix)


def bf16(torch: Any, index: int) -> Check:
    """Multiply in bfloat16 where the GPU has it."""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return _check(f"bf16_{index}", "warn", f"Compute capability {major}.{minor} has no bf16; fp16 is used.")
    return matrix_product(torch, index, "bf16")


def four_bit(torch: Any, index: int) -> Check:
    """Quantise a matrix to NF4 and back with bitsandbytes."""
    import bitsandbytes.functional as functional

    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(f"cuda:{index}")
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((functional.dequantize_4bit(packed, state) - weight).abs().mean())
    # The mean error of NF4 on a standard normal is 0.073 (QLoRA, appendix E: 4-bit NormalFloat).
    status = "pass" if error < 0.1 else "fail"
    return _check(f"bitsandbytes_4bit_{index}", status, f"Mean error of NF4 on normal weights: {error:.3f}.")


def unsloth_importable(_torch: Any) -> Check:
    """Import Unsloth, which checks the versions of what it patches."""
    import unsloth  # noqa: F401

    return _check("unsloth", "pass", f"unsloth {version('unsloth')} imports.")


def free_memory(torch: Any, index: int) -> Check:
    """Is there room for a small model?"""
    free, total = torch.cuda.mem_get_info(index)
    status = "pass" if free > 2048 * _MIB else "warn"
    fix = None if status == "pass" else "End other programs on the GPU; `nvidia-smi` lists them."
    return _check(f"memory_{index}", status, f"{free // _MIB} MiB of {total // _MIB} MiB free.", fix)


def guarded(name: str, check: Callable[..., Check], *arguments: Any) -> Check:
    """Run a check; what it raises is its answer."""
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001 - any failure of a check is that check's result
        return _check(
            name, "fail", f"{type(error).__name__}: {error}", "Reinstall the package for this GPU and driver."
        )


def run(torch: Any) -> list[Check]:
    """Run every check that makes sense after the ones before it."""
    checks = [guarded("torch_build", torch_build, torch)]
    if checks[0]["status"] == "fail":
        return checks
    for index in range(torch.cuda.device_count()):
        checks.append(guarded(f"matrix_product_fp32_{index}", matrix_product, torch, index, "fp32"))
        checks.append(guarded(f"bf16_{index}", bf16, torch, index))
        checks.append(guarded(f"bitsandbytes_4bit_{index}", four_bit, torch, index))
        checks.append(guarded(f"memory_{index}", free_memory, torch, index))
    checks.append(guarded("unsloth", unsloth_importable, torch))
    return checks


def main() -> None:
    """Write the checks to the pipe named in the environment."""
    hide_broken_torchvision()
    import torch

    with os.fdopen(int(os.environ["PEFT_STUDIO_RESULT_FD"]), "w") as results:
        json.dump(run(torch), results)


if __name__ == "__main__":
    main()
