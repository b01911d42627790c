"""Planning (plan=true): a config in; memory and time on given GPUs out, without training."""
