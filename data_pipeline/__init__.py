"""From tar shard to batch: knows no model, no DeepSpeed and no Slurm; rank and world size are plain integers."""
