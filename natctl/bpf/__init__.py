"""Programs that run in the kernel (eBPF): their sources in C, and how they get there."""
