"""A CUDA runtime where there is none: copies from page-locked memory happen late, all else as CUDA's rules say.

A copy reads its source when a stream gets to it, by address, and keeps nothing alive. A stream gets on only when it is
waited for, or after it was asked often whether it has.
"""

import collections
import contextlib
import ctypes
import os

import torch

N_QUERIES = 6
"""How often an event must be asked for before its stream has come to it."""


class OnDevice(torch.Tensor):
    """A tensor on the simulated device."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def record_stream(self, stream):
        pass


class Event:
    def __init__(self, stream):
        self.stream, self.place, self.n_queries = stream, stream.n_queued, 0

    def __del__(self):
        # So torch's own: its destructor throws.
        if os.getpid() != self.stream.cuda.pid:
            os.abort()

    def query(self):
        self.stream.cuda.check_process()
        self.n_queries += 1
        if self.n_queries >= N_QUERIES:
            self.synchronize()
        return self.stream.n_done >= self.place

    def synchronize(self):
        self.stream.cuda.check_process()
        self.stream.run(self.place)


class Stream:
    def __init__(self, cuda):
        self.cuda, self.queue, self.n_queued, self.n_done = cuda, collections.deque(), 0, 0
        cuda.streams.append(self)

    def put(self, action):
        self.queue.append(action)
        self.n_queued += 1

    def run(self, place):
        while self.n_done < place:
            self.n_done += 1
            self.queue.popleft()()

    def record_event(self):
        return Event(self)

    def wait_event(self, event):
        self.put(event.synchronize)


class SimulatedCuda:
    """What `torch.cuda` and tensors do with one device; `install` puts it in their place.

    Attributes:
        registered: Size of the memory that is page-locked, by address.
        refuses: Whether it refuses to page-lock more.
    """

    def __init__(self):
        self.pid, self.registered, self.refuses, self.last_error = os.getpid(), {}, False, 0
        self.streams = []
        self.current = Stream(self)

    def install(self, monkeypatch):
        for name in ("cudart", "current_stream", "stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(self))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        to, zeros = torch.Tensor.to, torch.zeros

        def move(tensor, device=None, dtype=None, non_blocking=False):
            if isinstance(device, torch.dtype):
                device, dtype = None, device
            if device is not None and torch.device(device).type == "cuda":
                # Torch would convert before it copies.
                return self.copy(tensor if dtype is None else to(tensor, dtype), non_blocking)
            if isinstance(tensor, OnDevice) and dtype not in (None, tensor.dtype):
                return self.convert(tensor, dtype)
            return to(tensor, device=device, dtype=dtype, non_blocking=non_blocking)

        def make_zeros(*args, device=None, **options):
            if device is not None and torch.device(device).type == "cuda":
                self.launch()
            return zeros(*args, **options)

        monkeypatch.setattr(torch.Tensor, "to", move)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: self.is_pinned(tensor))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin_memory(tensor))
        monkeypatch.setattr(torch, "zeros", make_zeros)

    def check_process(self):
        if os.getpid() != self.pid:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    def launch(self):
        """Run a kernel, as a training step does."""
        self.check_process()
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error: {error}")

    def cudart(self):
        self.check_process()
        return self

    def cudaHostRegister(self, address, nbytes, flags):
        if self.refuses or any(a < address + nbytes and address < a + n for a, n in self.registered.items()):
            self.last_error = 712
            return 712
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        if address not in self.registered:
            self.last_error = 713
            return 713
        del self.registered[address]
        return 0

    def current_stream(self, device=None):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, device=None):
        self.check_process()
        for stream in self.streams:
            stream.run(stream.n_queued)

    def is_pinned(self, tensor):
        at = tensor.data_ptr()
        return hasattr(tensor, "pinned") or any(a <= at < a + n for a, n in self.registered.items())

    def pin_memory(self, tensor):
        pinned = tensor.clone()
        pinned.pinned = True
        return pinned

    def convert(self, tensor, dtype):
        converted = torch.empty(tensor.shape, dtype=dtype).as_subclass(OnDevice)
        self.current.put(lambda: converted.copy_(tensor))
        return converted

    def copy(self, tensor, non_blocking=False):
        copy, source, nbytes = torch.empty_like(tensor).as_subclass(OnDevice), tensor.data_ptr(), tensor.nbytes
        # torch itself keeps what it has pinned.
        kept = tensor if hasattr(tensor, "pinned") else None
        self.current.put(lambda: (ctypes.memmove(copy.data_ptr(), source, nbytes), kept))
        if not (non_blocking and self.is_pinned(tensor)):
            self.current.run(self.current.n_queued)
        return copy
