"""What people run beside the daemon: checkpoints, benchmarks, house checks."""
