"""What a training step is, and what happens around one."""
