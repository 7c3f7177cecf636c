"""Streaming data: sources of photos and titles, augmentation, batches, and loaders that own their position."""
