"""The local training step: the parts of a Llama-like model as fused, differentiable functions.

`rows.py` RMSNorm and SwiGLU, `attention.py` attention with rotary positions, `adapted_linear.py`
frozen linears with low-rank adapters, `loss.py` the cross-entropy that never holds all logits,
`acceleration.py` the one call that puts them into a model. All of them treat the base's weights as
frozen: gradients go to activations and to adapters. Without a compiled backend, on other devices and
in other dtypes they are the functions of `reference/training.py`.
"""
