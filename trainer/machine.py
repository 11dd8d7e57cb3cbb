"""What this machine is: GPU names and memory through NVML, the processor and its memory. Never imports torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver sees it; memory in GiB, other programs' use included."""

    index: int
    uuid: str
    name: str
    total_gib: float
    free_gib: float


@dataclass(frozen=True)
class Machine:
    """The machine for a person: what would train, how much memory is free, and what to mend."""

    gpus: tuple[Gpu, ...]
    cpu_name: str
    cores: int
    total_gib: float
    free_gib: float
    torch_is_cpu_build: bool
    advice: str | None

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that training would use, or None where it runs on the CPU."""
        return None if self.torch_is_cpu_build or not self.gpus else self.gpus[0]

    @property
    def device(self) -> str:
        """The device's name for locks: "gpu-UUID" or "cpu"."""
        return self.gpu.uuid.lower() if self.gpu else "cpu"

    @property
    def summary(self) -> str:
        """ "NVIDIA RTX 4090 · 23.1 GiB free", or the same of the processor."""
        name, free = (self.gpu.name, self.gpu.free_gib) if self.gpu else (self.cpu_name, self.free_gib)
        return f"{name} · {free:.1f} GiB free"


PATIENCE_S = 2.0
"""So long a question to the driver may take; a driver that hangs costs the answer, and no thread but its own."""
NO_READING: dict[str, float | None] = dict.fromkeys(
    ("device_gib", "limit_gib", "utilisation", "temperature_c", "power_w")
)


class Nvml:
    """The driver's library; every reading is None where there is no driver, no GPU, or the call fails or hangs."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._known: dict[int, Gpu] = {}
        self._asking: threading.Thread | None = None
        self._turn = threading.Lock()
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except ImportError:
            return
        except pynvml.NVMLError:
            return

    def _ask(self, function: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*args)
        except (self._nvml.NVMLError, OSError, AttributeError, ValueError):  # also a library that was taken away
            return None

    def _patiently(self, question: Callable[[], Any]) -> Any:
        """The answer, or None when it takes too long; while a question hangs, none further is asked."""
        answer: list[Any] = []
        with self._turn:
            if self._asking is not None and self._asking.is_alive():
                return None
            asking = threading.Thread(target=lambda: answer.append(question()), name="nvml", daemon=True)
            self._asking = asking
            asking.start()
            asking.join(PATIENCE_S)
        return answer[0] if answer else None

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs this process may use, in the order torch numbers them; one that does not answer as it was last known."""
        if not self._handles:
            return ()
        self._patiently(self._look)
        return tuple(_visible([*self._known.values()], os.environ.get("CUDA_VISIBLE_DEVICES")))

    @property
    def is_silent(self) -> bool:
        """Whether there are GPUs, none of which has ever answered."""
        return bool(self._handles) and not self._known

    def _look(self) -> None:
        for index, handle in enumerate(self._handles):
            memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
            if memory is None:
                continue  # a device that fell off the bus is not forgotten: a run for it must not land on the CPU
            uuid, name = self._ask("nvmlDeviceGetUUID", handle), self._ask("nvmlDeviceGetName", handle)
            self._known[index] = Gpu(index, str(uuid), str(name), memory.total / GIB, memory.free / GIB)

    def reading(self, index: int) -> dict[str, float | None]:
        """Device memory in use (GiB), its limit, utilisation (%), temperature (degrees Celsius), power (watts)."""
        return self._patiently(lambda: self._read(index)) or NO_READING

    def _read(self, index: int) -> dict[str, float | None]:
        handle = self._handles[index]
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        use = self._ask("nvmlDeviceGetUtilizationRates", handle)
        power_mw = self._ask("nvmlDeviceGetPowerUsage", handle)
        return {
            "device_gib": memory.used / GIB if memory else None,
            "limit_gib": memory.total / GIB if memory else None,
            "utilisation": float(use.gpu) if use else None,
            "temperature_c": self._ask("nvmlDeviceGetTemperature", handle, 0),
            "power_w": power_mw / 1000 if power_mw is not None else None,
        }


def _visible(gpus: list[Gpu], setting: str | None) -> list[Gpu]:
    """CUDA_VISIBLE_DEVICES applied: indices or UUIDs, in its order; the first unknown entry ends the list, as in CUDA."""
    if setting is None:
        return gpus
    chosen = []
    for entry in (part.strip() for part in setting.split(",")):
        match = [g for g in gpus if (entry.isdigit() and g.index == int(entry)) or (entry and g.uuid.startswith(entry))]
        if not match:
            break
        chosen.append(match[0])
    return chosen


def torch_cuda_version() -> str | None:
    """The CUDA version the installed torch was built for, None for a CPU build; read from its files, not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda(?::[^=]*)?\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(nvml: Nvml | None = None) -> Machine:
    """Read the machine now."""
    nvml = nvml or Nvml()
    gpus = nvml.gpus()
    cpu_build = torch_cuda_version() is None
    advice = None
    if gpus and cpu_build:
        advice = (
            f"This machine has an {gpus[0].name}, but the installed torch is a CPU build, so training would run on the CPU. "
            "Install: pip install --force-reinstall torch"
        )
    elif nvml.is_silent:
        advice = (
            "There is a GPU, but its driver does not answer, so training would run on the CPU. Restart the machine."
        )
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return Machine(gpus, _cpu_name(), cores, memory.total / GIB, memory.available / GIB, cpu_build, advice)
