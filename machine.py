"""
The machine: device, precision, compiler, the processes that torchrun started, signals and memory.

Every function does nothing special in a single process, so that the training loop need not ask how many there are.
"""
import contextlib
import ctypes
import os
import re
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from configurator import Fault, UserError


def rank():
    """The number of this process among all that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def world_size():
    return int(os.environ.get("WORLD_SIZE", "1"))


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype             # of the matrix products
    compiled: bool                 # whether torch.compile is used

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_device(name):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:1"; UserError if it is not there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device={name} is unknown; use auto, cpu or cuda")
    if name.startswith("cuda") and not cuda:
        raise UserError(f"device={name}, but torch {torch.__version__} sees no CUDA device; use --device=cpu")
    device = torch.device(name)
    if cuda and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def has_bf16(device):
    """Whether the device multiplies bfloat16 in hardware; a CPU that emulates it is slower than with float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_dtype(name, device):
    """The torch.dtype of "auto", "float32" or "bfloat16"; UserError if a GPU has no bfloat16."""
    if name == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    if name == "bfloat16" and device.type == "cuda" and not has_bf16(device):
        raise UserError(f"dtype=bfloat16, but {torch.cuda.get_device_name(device)} has none; use --dtype=float32")
    return getattr(torch, name)


def choose_machine(cfg):
    """The Machine for settings device, dtype and compile, printed in one line; UserError for what is not there."""
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        raise UserError("RANK is set, but LOCAL_RANK is not; start with torchrun, which sets both, or unset RANK")
    if world_size() > 1 and cfg.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={cfg.device}, but {world_size()} processes need one each; use --device=cuda, and "
                        "CUDA_VISIBLE_DEVICES to choose")
    one_each = "RANK" in os.environ and cfg.device != "cpu" and torch.cuda.is_available()
    device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}" if one_each else cfg.device)
    dtype = choose_dtype(cfg.dtype, device)
    on_gpu = device.type == "cuda"
    compiler = shutil.which(os.environ.get("CC", "gcc") if on_gpu else os.environ.get("CXX", "g++"))
    compiled = on_gpu and bool(compiler) if cfg.compile == "auto" else cfg.compile == "true"
    if compiled and not compiler:
        raise UserError("compile=true, but there is no C++ compiler (gcc, g++); install one or use --compile=false")
    hint = " (true takes a minute, then is faster)" if compiler and not compiled and cfg.compile == "auto" else ""
    print(f"device {device}, products in {str(dtype)[6:]}, compile {str(compiled).lower()}{hint}")
    return Machine(device, dtype, compiled)


# ---- processes ----

def join_processes(device):
    """Meet the other processes that torchrun started, if it started this one."""
    if device.index is not None:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))        # the first one evaluates and saves alone


@contextlib.contextmanager
def peers():
    """Turn the error that a process meets when another one has ended into a Fault."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not re.search("[Cc]onnection (closed|reset)|NCCL", str(error)):
            raise
        raise Fault(f"process {rank()}: another process has ended, so this one cannot go on") from None


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """The first process's value, in all."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def all_reduce(numbers, device, op=dist.ReduceOp.SUM):
    """The sum, or another op, of each number over all processes, as a list of floats."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(numbers, op)
    return numbers.tolist()


def any_process(signals, device):
    """The number of a signal that any process has caught, or 0; the same in all."""
    number, = all_reduce([max(signals, default=0)], device, dist.ReduceOp.MAX)
    return int(number)


def full_tensor(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def catch_signals():
    """A list that receives the first SIGINT or SIGTERM; the loop then saves and leaves. A second one leaves at once."""
    caught = []

    def note(number, frame):
        signal.signal(number, signal.SIG_DFL)
        caught.append(number)
        name = signal.Signals(number).name
        print(f"{name}: finishing the step, then saving; again to leave at once", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def shutdown(code):
    """End one of several processes at once: gloo was seen to hang, under load, while it was taken down in order."""
    with contextlib.suppress(RuntimeError):             # the other has left already, and all is saved
        barrier()                                       # torchrun ends all as soon as one leaves
    sys.stdout.flush()
    os._exit(code)


# ---- memory ----

def peak_gb(device):
    """The most memory so far in GB: of tensors on a CUDA device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():                 # and not getrusage, which counts what the parent of a new process held
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e9
    import resource                     # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 976562.5)


def keep_memory():
    """Let glibc reuse the memory of large tensors, in huge pages: returning it to the kernel and faulting it in again
    took half of a training step on a CPU (bench/LOG.md). To be called before the first tensor; elsewhere it does
    nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")       # torch then aligns large tensors to huge pages
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                  # M_MMAP_MAX: no allocation through mmap
        libc.mallopt(-1, 2 ** 31 - 1)        # M_TRIM_THRESHOLD: do not shrink the heap
