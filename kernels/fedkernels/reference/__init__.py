"""The truth: every primitive in slow, plain torch, against which the fast backends are tested.

One file a family, with the names that the public modules have: `probes`, `quantized`, `training`,
`pruning`. Nothing here is tuned; where bits are a law, the bits are those of these functions.
"""
