"""What every layer may use: settings, errors, clock, cache, logging, files. Knows nothing of fine-tuning."""
