"""What each kernel takes, against its reference on the same data in the same run.

A module here that defines ``rows(quick: bool) -> list[Row]`` is one family of `fedbraid bench
kernels`; nothing else has to be registered.
"""
