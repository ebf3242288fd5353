"""VM Monitoring Agent: measures every VM from the host."""
