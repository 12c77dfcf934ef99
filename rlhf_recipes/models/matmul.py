"""Float32 matrix products by oneDNN on AMD processors, where PyTorch's default, Intel's MKL, does without AVX-512.

Measured on an AMD EPYC (Zen 4 or later), one core: 230 instead of 105 GFLOP/s. oneDNN ships with PyTorch, which already uses
it for bfloat16.
"""

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

_SMALL = 4096  # elements, below which the detour costs more than it saves


@functools.cache
def use_onednn_on_amd() -> torch.library.Library | None:
    """Replaces this process's float32 CPU kernel of `torch.mm`, under its autograd, where that is faster.

    Returns:
        what holds the kernel, which goes when it does (the cache keeps it), or None where nothing was replaced.
    """
    cpu = Path("/proc/cpuinfo")
    amd = cpu.is_file() and "AuthenticAMD" in cpu.read_text()
    if not amd or torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        library.impl("mm", _mm, "CPU")
        library.impl("mm.out", _mm_out, "CPU")
    return library


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n]"""
    single = a.dtype is torch.float32 is b.dtype
    if single and a.numel() > _SMALL and b.numel() > _SMALL and a.shape[1] == b.shape[0] and b.shape[1] > 1:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.addmm(a.new_empty(a.shape[0], b.shape[1]), a, b, beta=0)  # PyTorch's own kernel


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.resize_(a.shape[0], b.shape[1]).copy_(_mm(a, b))
