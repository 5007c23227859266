"""What a fine-tune needs, and whether a device has it."""
