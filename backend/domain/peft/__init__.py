"""The methods, and the settings of a fine-tune."""
