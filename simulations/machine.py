"""Facts about this machine that decide whether and how well fedbraid runs. No judgement here."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from packaging.requirements import InvalidRequirement, Requirement

DISTRIBUTION = "fedbraid"
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
USED_EXTRAS = ("client", "server", "sim")
"""The extras that a simulation needs; the others are for development and GPUs."""

T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """A requirement and what is installed. ``extra`` is "" for what is always needed."""

    name: str
    wanted: str
    extra: str
    installed: str | None
    satisfied: bool


@dataclass(frozen=True)
class Place:
    """A folder that will be written to. ``free`` is in bytes, None where it cannot be told."""

    path: Path
    free: int | None
    writable: bool


@dataclass(frozen=True)
class Machine:
    """What was found. None means: could not be told here. Sizes are in bytes."""

    python: str
    python_wanted: str
    packages: tuple[Package, ...]
    processors: int
    processor_quota: float | None
    torch_threads: int | None
    wait_policy: str
    memory_total: int | None
    memory_free: int | None
    cache: Place
    output: Place
    model: str
    model_cached: bool | None
    pip: bool
    kernels: tuple[str, ...]
    kernels_error: str
    compiler: str
    ray_error: str | None
    telemetry: str
    gpus: tuple[str, ...]
    gpu_driver: bool


def inspect_machine(output: Path | None = None) -> Machine:
    """Look at this machine; nothing is changed and nothing is sent anywhere."""
    cache, model, cached = _model()
    kernels, kernels_error = _kernels()
    total, free = _memory()
    return Machine(
        python=platform.python_version(),
        python_wanted=python_wanted(),
        packages=tuple(packages()),
        processors=processors(),
        processor_quota=_quota(Path("/sys/fs/cgroup/cpu.max")),
        torch_threads=_attempt(_torch_threads),
        wait_policy=os.environ.get("OMP_WAIT_POLICY", ""),
        memory_total=total,
        memory_free=free,
        cache=place(cache),
        output=place(output or Path("runs")),
        model=model,
        model_cached=cached,
        pip=importlib.util.find_spec("pip") is not None,
        kernels=kernels,
        kernels_error=kernels_error,
        compiler=_compiler(),
        ray_error=_import_error("ray"),
        telemetry=os.environ.get("FLWR_TELEMETRY_ENABLED", ""),
        gpus=_attempt(_gpus) or (),
        gpu_driver=shutil.which("nvidia-smi") is not None,
    )


def python_wanted() -> str:
    """The Python versions that fedbraid asks for, "" where neither file nor metadata say."""
    try:
        return str(metadata.metadata(DISTRIBUTION).json.get("requires_python", ""))
    except metadata.PackageNotFoundError:
        return str(_project().get("requires-python", ""))


def packages() -> list[Package]:
    """Every requirement of fedbraid and of the extras that a simulation needs."""
    found = []
    for extra, line in _requirement_lines():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name == DISTRIBUTION:
            continue
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        installed = _installed(requirement.name)
        found.append(
            Package(
                name=requirement.name,
                wanted=str(requirement.specifier),
                extra=extra,
                installed=installed,
                satisfied=installed is not None
                and requirement.specifier.contains(installed, prereleases=True),
            )
        )
    return found


def processors() -> int:
    """Processors that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def place(path: Path) -> Place:
    """Free space and permission of the nearest folder that exists."""
    nearest = path.expanduser().absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        free: int | None = shutil.disk_usage(nearest).free
    except OSError:
        free = None
    return Place(path, free, nearest.is_dir() and os.access(nearest, os.W_OK))


def _requirement_lines() -> list[tuple[str, str]]:
    """(extra, requirement) of the source tree, else of the installed distribution."""
    project = _project()
    if project:
        lines = [("", line) for line in _texts(project.get("dependencies"))]
        extras = project.get("optional-dependencies")
        for extra in USED_EXTRAS:
            wanted = extras.get(extra) if isinstance(extras, dict) else None
            lines += [(extra, line) for line in _texts(wanted)]
        return lines
    try:
        installed = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    return [(_extra_of(line), line) for line in installed if _extra_of(line) in ("", *USED_EXTRAS)]


def _project() -> dict[str, object]:
    """The [project] table beside the package; {} for an installed wheel."""
    try:
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8")).get("project", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}
    is_ours = isinstance(project, dict) and project.get("name") == DISTRIBUTION
    return project if is_ours else {}


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _extra_of(line: str) -> str:
    match = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
    return match[1] if match else ""


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _quota(limits: Path) -> float | None:
    """Processors' worth of time that a container may use (cgroup v2), None without a limit."""
    try:
        quota, period = limits.read_text(encoding="ascii").split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _memory() -> tuple[int | None, int | None]:
    """(total, available), of the machine or of the container where that is less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None, None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total, free
    return min(total, limit), max(min(free, limit - used), 0)


def _model() -> tuple[Path, str, bool | None]:
    """(cache folder, name of the embedded model, whether it is there)."""
    try:
        from fedclient.base_model import DEFAULT_MODEL, cache_folder
    except Exception:  # whatever is broken there is reported as a missing package
        return Path.home() / ".cache" / DISTRIBUTION, "embedded model", None
    folder = cache_folder() / DEFAULT_MODEL
    cached = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return cache_folder(), DEFAULT_MODEL, cached


def _kernels() -> tuple[tuple[str, ...], str]:
    try:
        import fedkernels
    except Exception as error:
        return (), f"{type(error).__name__}: {error}"
    return tuple(fedkernels.backends()), ""


def _compiler() -> str:
    """The C++ compiler that a build would find, "" without one."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"):
        if name and (found := shutil.which(name.split()[0])):
            return found
    return ""


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported; None when it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _gpus() -> tuple[str, ...]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _attempt(question: Callable[[], T]) -> T | None:
    try:
        return question()
    except Exception:  # a broken installation must not break the tool that says so
        return None
