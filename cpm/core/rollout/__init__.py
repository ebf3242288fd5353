"""In which order kernels are told: desired state, what each node was told and confirmed, the steps of a range."""
