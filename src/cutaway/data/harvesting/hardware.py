"""What the processor and its C library do well or badly."""

import ctypes
import platform
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


@cache
def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory in this process; False where it is not glibc.

    glibc gives large freed blocks back to the system and asks for them again at the next operation, and the kernel then
    clears the pages anew: on a CPU up to half of a small model's forward pass. This changes nothing but speed: peak
    memory is the same, but stays with the process until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) for name, value in settings)


def bfloat16_is_fast(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies matrices faster in bfloat16 than in float32.

    A CPU does with AVX512-BF16, AMX or SVE's bf16 instructions; without them bfloat16 is emulated, and slower.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
