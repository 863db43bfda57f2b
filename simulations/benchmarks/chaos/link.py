"""A point-to-point link whose faults are real: it carries IP packets, and loses, delays or queues them.

Both ends are TUN interfaces, one in this process's network namespace and one in a host's; a thread
carries the packets in between. TCP on both sides reacts as it would to such a network, which a
proxy that ends and begins connections cannot show. Needs root and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from dataclasses import dataclass

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES = 65536
# What waits for a slow link, as in a modem: above it packets are dropped, which is how TCP finds
# the rate.
QUEUE_BYTES = 32 * 1024
LOOK_SECONDS = 0.2


@dataclass
class Weather:
    """What the link does to packets now, both ways; may be changed at any time.

    ``loss``: probability. ``bits_per_second``: 0 is no limit. ``latency``: seconds. ``cut``: no packet
    passes, and nobody is told.
    """

    loss: float = 0.0
    bits_per_second: int = 0
    latency: float = 0.0
    cut: bool = False


class Link:
    """A link to the network namespace of process ``pid``. Addresses are IPv4."""

    def __init__(self, name: str, own: str, far: str, pid: int, *, seed: int = 0) -> None:
        """``own``: this side's address. ``far``: the host's, whose default route the link becomes."""
        self.weather = Weather()
        self.lost = 0
        self.carried = 0
        self._chance = random.Random(seed)
        self._near, self._far = _tun(f"{name}n"), _tun(f"{name}f")
        _ip("addr", "add", own, "peer", far, "dev", f"{name}n")
        _ip("link", "set", f"{name}n", "up")
        _ip("link", "set", f"{name}f", "netns", str(pid))
        inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
        for words in (
            ["addr", "add", far, "peer", own, "dev", f"{name}f"],
            ["link", "set", f"{name}f", "up"],
            ["route", "add", "default", "dev", f"{name}f"],
        ):
            subprocess.run([*inside, *words], check=True)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._carry, name=f"link {name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the link; its interfaces go."""
        self._closing.set()
        self._thread.join()
        os.close(self._near)
        os.close(self._far)

    def _carry(self) -> None:
        other = {self._near: self._far, self._far: self._near}
        free = dict.fromkeys(other, 0.0)
        waiting: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        while not self._closing.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, to, packet = heapq.heappop(waiting)
                self._deliver(to, packet)
            pause = min(waiting[0][0] - now, LOOK_SECONDS) if waiting else LOOK_SECONDS
            for source in select.select(list(other), [], [], pause)[0]:
                packet = os.read(source, PACKET_BYTES)
                due = self._due(source, len(packet), free)
                if due is None:
                    self.lost += 1
                else:
                    heapq.heappush(waiting, (due, next(order), other[source], packet))

    def _due(self, source: int, size: int, free: dict[int, float]) -> float | None:
        """When a packet arrives at the other side; None if it never does."""
        weather, now = self.weather, time.monotonic()
        if weather.cut or self._chance.random() < weather.loss:
            return None
        if not weather.bits_per_second:
            return now + weather.latency
        begins = max(now, free[source])
        if (begins - now) * weather.bits_per_second / 8 > QUEUE_BYTES:
            return None
        free[source] = begins + 8 * size / weather.bits_per_second
        return free[source] + weather.latency

    def _deliver(self, to: int, packet: bytes) -> None:
        if self.weather.cut:
            self.lost += 1
            return
        try:
            os.write(to, packet)
            self.carried += 1
        except OSError:
            # The interface is down or gone, as a cable may be.
            self.lost += 1


def _tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
