"""The kernels in Triton, for tensors on a GPU; in Triton's interpreter, for any tensor.

Importing a file of this package imports Triton; `fedkernels` itself does not. Every kernel is also
run in the interpreter (TRITON_INTERPRET=1) by the tests, which need no GPU, and compiled there for
two generations of GPUs.
"""
