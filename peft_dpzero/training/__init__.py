"""Who drives the step: the Trainer."""
