"""Flower's SuperNode, mended: ``python -m fedclient.resident.supernode ARGUMENTS``.

The SuperNode looks for a message every 3 s, whatever was before; over two nodes that alone is two
seconds of every round. Here it looks soon after a message was handled, and ever more rarely while none
comes: a hundred idle nodes must not keep a SuperLink busy.

A SuperNode whose loop has ended, or whose heartbeat has, lives on and serves nobody. Here its process
ends, and is started again; what it waits out before is in ``fleet``.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any, NoReturn

from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate import in_memory_corestate
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.nodestate import in_memory_nodestate, nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fedclient.resident.fleet import Heartbeat, TimedSignature, patient_invoker
from fedclient.resident.server_clock import ServerClock

SHORTEST, LONGEST, GROWTH = 0.25, 3.0, 1.2
REPLY_SECONDS = 0.1
# Of Flower's 30 s. A ClientApp tells that it lives every 18 to 23 s; without word of it for this many
# intervals it was killed, and the SuperNode takes no other message until then.
PATIENCE = 1


class Waits:
    """Stands for the module ``time`` in Flower's loop.

    It sleeps for 3 s there where it is idle, for half a second where it waits for a ClientApp's reply.
    """

    def __init__(self) -> None:
        self._idle = SHORTEST

    def sleep(self, seconds: float) -> None:
        """Wait as long as the loop's state suggests, never longer than was asked."""
        if seconds < 1.0:
            self._idle = SHORTEST
            time.sleep(min(seconds, REPLY_SECONDS))
            return
        time.sleep(min(seconds, self._idle))
        self._idle = min(self._idle * GROWTH, LONGEST)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class NodeState(InMemoryNodeState):
    """Flower's state of a SuperNode, which never waits for a reply that nobody will send.

    A ClientApp that is told to stop ends its task without a reply, as it is when its SuperExec dies; one
    that is killed before it has fetched its message is not missed either. The SuperNode would wait for
    both for ever, and take no other message.
    """

    def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
        """Finish a task; for a ClientApp that sent no reply, reply with Flower's error for a crash."""
        finished = super().finish_task(task_id, sub_status, details)
        # One that has completed may be overtaken by the next message, which is not its own.
        if finished and sub_status != SubStatus.COMPLETED:
            self._answer_for(self.get_tasks(task_ids=[task_id]))
        return finished

    def _on_task_tokens_expired(self, tasks: Any) -> None:
        self._answer_for(tasks)
        super()._on_task_tokens_expired(tasks)

    def _answer_for(self, tasks: Any) -> None:
        runs = {task.run_id for task in tasks if task.type == TaskType.CLIENT_APP}
        with self.lock_msg_store:
            # One message is handled at a time: what is here without a reply is the task's.
            for entry in self.msg_store.values():
                if entry.message.metadata.run_id in runs:
                    own = not entry.message.metadata.reply_to_message_id
                    entry.is_retrieved = entry.is_retrieved or own
            self._store_error_replies(runs, in_memory_nodestate.CLIENT_APP_CRASHED_ERROR)


def mend(clock: ServerClock | None = None) -> None:
    """Mend this process's SuperNode, before it is started. ``clock``: by which requests are signed."""
    vars(start_client_internal)["time"] = Waits()
    vars(in_memory_corestate)["HEARTBEAT_PATIENCE"] = PATIENCE
    vars(nodestate_factory)["InMemoryNodeState"] = NodeState
    fleet: dict[str, Any] = vars(fleet_http_connection)
    fleet["make_simple_http_retry_invoker"] = patient_invoker
    fleet["HeartbeatSender"] = Heartbeat
    fleet["NodeAuthHttpInterceptor"] = TimedSignature.by(clock or ServerClock())


def run() -> NoReturn:
    """Run Flower's SuperNode with this process's arguments; the process ends with its loop.

    Flower's thread for ClientApps would keep the process alive.
    """
    from flwr.supernode.cli.flower_supernode import flower_supernode

    status = 1
    try:
        flower_supernode()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    mend()
    run()
