"""`make families`: every causal family of the installed transformers, tried in small, and what came of it."""
