"""What `make gpu-check` is made of: correctness against the CPU's reference, then timings."""
