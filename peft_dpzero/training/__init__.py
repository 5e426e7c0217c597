"""Who drives the step: a run, and the Trainer over it."""
