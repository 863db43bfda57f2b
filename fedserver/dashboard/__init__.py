"""The operator's dashboard: reads run folders, serves pages, JSON, CSV and one event stream a page.

It imports neither torch nor the round loop: it must stay small beside a run that needs the memory.
"""
