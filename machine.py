"""
The machine: device, precision, compiler, the processes that torchrun started, signals and memory.

In a single process every function does nothing special, so the training loop need not ask how many there are.
"""
import collections
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


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype             # of the matrix products
    compiled: bool                 # whether torch.compile is used

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_machine(cfg):
    """The Machine of the settings device, dtype and compile, printed in one line; UserError for what is not there. With
    compile auto a GPU compiles, if it can."""
    one_each = "RANK" in os.environ and cfg.device != "cpu" and torch.cuda.is_available()
    device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', rank())}" if one_each else cfg.device)
    dtype = choose_dtype(cfg.dtype, device)
    wanted = cfg.compile == "true" or cfg.compile == "auto" and device.type == "cuda"
    fault = compiler_fault(device) if wanted else ""
    if fault and cfg.compile == "true":
        raise UserError(f"compile=true, but torch.compile fails here ({fault}); mend that, or use --compile=false")
    if fault:
        print(f"warning: torch.compile fails here ({fault}); training goes on without, slower", file=sys.stderr)
    compiled = wanted and not fault
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)         # it plans anew for every shape
        precision = "high" if dtype == torch.bfloat16 else "highest"
        torch.set_float32_matmul_precision(precision)       # TF32 where products are not in bfloat16: evaluation
    print(f"device {device}, products in {str(dtype)[6:]}, compile {str(compiled).lower()}")
    return Machine(device, dtype, compiled)


def compiler_fault(device):
    """Why a tiny function cannot be compiled for a device (no compiler, no Python.h, no Triton), or ""."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler"                            # torch takes 10 s to find out
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:                              # the compilers below it raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return ""


def choose_device(name):
    """The torch.device of "auto", "cpu", "cuda", "cuda:1" or "mps" (Apple's GPU); UserError if it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        there = {"cuda": count, "mps": has_mps, "cpu": True}
        name = next(kind for kind in there if there[kind])
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"device={name} is unknown; use auto, cpu, cuda or mps")
    device = torch.device(name)
    if name == "mps" and not has_mps:
        raise UserError(f"device=mps, but torch {torch.__version__} sees no GPU of Apple's; use --device=cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"sees {count} CUDA devices, counted from 0" if count else "sees no CUDA device"
        raise UserError(f"device={name}, but torch {torch.__version__} {found}; use --device=cpu")
    return device


def choose_dtype(name, device):
    """The torch.dtype of "float32", "bfloat16" or "auto": bfloat16 where the hardware has it, as emulation is slow."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has_bf16 = False
    else:
        has_bf16 = sys.platform == "linux" and re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text())
    if name == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    if name == "bfloat16" and device.type == "cuda" and not has_bf16:
        raise UserError(f"dtype=bfloat16, but {torch.cuda.get_device_name(device)} has none; use --dtype=float32")
    return getattr(torch, name)


class Replay:
    """A function of tensors, or None, whose kernels a CUDA device replays in one launch (a CUDA graph). For each set of
    shapes the first two calls are ordinary and the third is recorded. The next call overwrites what it returned."""

    def __init__(self, f, device):
        self.f, self.device = f, device
        self.calls, self.recorded = collections.Counter(), {}

    def __call__(self, *inputs):
        shapes = tuple(x if x is None else x.shape for x in inputs)
        self.calls[shapes] += self.device.type == "cuda"
        if self.calls[shapes] < 3:
            return self.f(*inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(*inputs)
        graph, mine, outputs = self.recorded[shapes]
        for x, y in zip(mine, inputs, strict=True):
            if x is not None:
                x.copy_(y)
        graph.replay()
        return outputs

    def record(self, *inputs):
        """(graph, its own inputs, its outputs)."""
        mine = [x if x is None else x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.f(*mine)
        return graph, mine, outputs


# ---- processes ----

def rank():
    """The number of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size():
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device):
    """Meet the other processes, if torchrun started this one."""
    if device.index is not None:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        on_gpu = device.type == "cuda"                      # numbers on the CPU go by gloo: no GPU waits for them
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=1),
                                device_id=device if on_gpu else None)       # an hour: the first process saves alone


@contextlib.contextmanager
def torch_faults():
    """Turn the errors of a process whose peer has ended, or whose memory does not suffice, into a Fault."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Fault(f"{str(error).splitlines()[0]}; use a smaller batch_size, or a smaller network") from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise Fault("out of memory; use a smaller batch_size, or a smaller network") from None
        if world_size() == 1 or not re.search("[Cc]onnection (closed|reset)|NCCL", str(error)):
            raise
        raise Fault(f"process {rank()}: another process has ended, so this one cannot go on") from None


def barrier():
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """The first process's value, in all."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def all_reduce(x, op=dist.ReduceOp.SUM):
    """The tensor x itself, which now holds the sum (or other op) over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def any_process(signals):
    """The number of a signal that any process has caught, or 0; the same in all."""
    return int(all_reduce(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX))


def full_tensor(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_tensor(x):
    return x.to_local() if isinstance(x, DTensor) else x


def catch_signals():
    """A list that receives SIGINT, SIGTERM and SIGHUP; the loop then saves and leaves. The same again kills."""
    caught = []

    def note(number, frame):
        signal.signal(number, signal.SIG_DFL)
        caught.append(number)
        name = signal.Signals(number).name
        if name == "SIGHUP":                            # the terminal is gone
            sys.stdout = sys.stderr = open(os.devnull, "w")
        print(f"{name}: finishing the step, then saving; again to leave at once", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):    # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:                  # nohup ignores SIGHUP
            signal.signal(number, note)
    return caught


def shutdown(code):
    """End one of several processes at once: gloo was seen to hang while it was taken down in order."""
    with contextlib.suppress(RuntimeError):             # of a peer that has left already
        barrier()                                       # torchrun ends all as soon as one leaves
    sys.stdout.flush()
    os._exit(code)


def peak_gb(device):
    """The most memory so far in GB: of tensors on a CUDA device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # getrusage counts what the parent of a new process held
    if found := re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.exists() else ""):
        return int(found[1]) * 1024 / 1e9
    import resource                     # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def keep_memory():
    """Let glibc reuse the memory of large tensors, in huge pages; call it before the first tensor. Returning memory to
    the kernel and faulting it in again took half of a training step on a CPU (bench/LOG.md)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")       # torch then aligns large tensors to huge pages
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)                                  # M_MMAP_MAX: no allocation through mmap
        libc.mallopt(-1, 2 ** 31 - 1)                        # M_TRIM_THRESHOLD: do not shrink the heap
