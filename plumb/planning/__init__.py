"""Planning (plan=true): a config in; memory and time on the planned GPUs out, without training."""
