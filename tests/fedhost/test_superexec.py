"""What a SuperExec has started leaves nothing behind when it has ended."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, time
import psutil
from fedhost.superexec import mend
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supercore.superexec.executor.types import ExecutionSpec

mend()
first = next(iter(subprocess_executor.TASK_TYPE_TO_COMMAND))
subprocess_executor.TASK_TYPE_TO_COMMAND = {first: "true"}
spec = ExecutionSpec(**{name: None for name in ExecutionSpec.__dataclass_fields__} | {
    "task_type": first, "task_id": 1, "runtime_api_address": "127.0.0.1:1", "token": "x",
    "insecure": True,
})
for _ in range(3):
    SubprocessExecutor().launch(spec)
until = time.monotonic() + 20
while psutil.Process().children() and time.monotonic() < until:
    time.sleep(0.01)
print(len(psutil.Process().children()))
"""


def test_a_process_that_has_ended_is_no_zombie() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.split() == ["0"], done.stderr
