"""Where processes run: Slurm, local jobs and the command line; no tensors."""
