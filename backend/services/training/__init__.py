"""Training jobs: what is asked, whether it can be done, the run, its checkpoints."""
