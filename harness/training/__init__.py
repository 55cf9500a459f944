"""Training one Series: the DeepSpeed engine, the loop over trunk and branches, checkpoints, preemption."""
