"""The static report: what the compiler makes of the kernels, for GPUs that are not there."""
