"""Edge aggregators: a server to the devices behind them, and one node to the server above."""
