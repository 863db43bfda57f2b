"""FedAvg over ten zeros; writes when each round ended, in seconds of the monotonic clock."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Keys of the run: ``times`` (file), ``rounds``."""
    times: list[float] = []

    def after_round(number: int, arrays: ArrayRecord) -> MetricRecord:
        times.append(time.monotonic())
        return MetricRecord({"round": number})

    FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(10, np.float32)]),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=after_round,
    )
    times.append(time.monotonic())
    Path(str(context.run_config["times"])).write_text(json.dumps(times))
