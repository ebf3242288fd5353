"""The order in which kernels are programmed: desired state, what each node was sent and confirmed, steps of a range."""
