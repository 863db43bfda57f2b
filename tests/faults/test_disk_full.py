"""No room left at any point of a run: it stops with one line, and --resume goes on to the same head."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCENARIO = """
base_model = "{model}"
rounds = 3
threads = 1
local_steps = 1
max_length = 48

[data]
source = "{data}"
held_out_max = 2
limit_per_node = 12

[[nodes]]
name = "first"
lora_r = 4

[[nodes]]
name = "second"
lora_r = 2
"""

# A limit of the size of any file stands for a disk of that size. It is taken away before the run is
# continued, and the next limit is tried in a fresh folder: blobs, log and database meet it in turn.
PROGRAM = """
import contextlib, io, json, resource, sys
from pathlib import Path
from simulations.command import main
from simulations.run import ledger_head
from fedserver.ledger import Ledger

scenario, folder = sys.argv[1], Path(sys.argv[2])

def simulate(run, *more):
    words = ["simulate", scenario, "--output", str(run), "--samples", "0", "--json", *more]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            return end.code or 0, err.getvalue()
    return 0, err.getvalue()

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

code, said = simulate(folder / "whole")
assert code == 0, said
whole = ledger_head(folder / "whole")
for size in map(int, sys.argv[3:]):
    run = folder / str(size)
    limit(size)
    code, said = simulate(run)
    limit(resource.RLIM_INFINITY)
    problems, entries = [], 0
    if (run / "ledger.db").is_file():
        ledger = Ledger(run)
        entries = ledger.height
        problems = ledger.verify() if entries else []
        ledger.close()
    again, complaint = simulate(run, *(["--resume"] if run.exists() else []))
    print(json.dumps({"size": size, "code": code, "said": said, "entries": entries,
        "problems": problems, "again": again, "complaint": complaint,
        "equal": again == 0 and ledger_head(run) == whole}))
"""


def test_a_full_disk_stops_a_run_and_loses_nothing(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO.format(model=tiny_model_folder, data=tiny_data_file))
    sizes = [6_000, 40_000, 110_000]
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(tmp_path), *map(str, sizes)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    print(made.stdout)
    found = [json.loads(line) for line in made.stdout.splitlines()]
    assert [one["size"] for one in found] == sizes
    for one in found:
        assert one["code"] == 2, one
        (line,) = one["said"].strip().splitlines()
        assert line.startswith("error: "), one
        assert one["problems"] == [], one
        assert one["again"] == 0, one
        assert one["equal"], one
    # The limits were met at unlike points of a run, in unlike files.
    assert len({one["entries"] for one in found}) > 1
