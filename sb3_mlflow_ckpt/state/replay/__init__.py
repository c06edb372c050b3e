"""Owns replay buffers: as immutable chunks on disk, shared by checkpoints, and back in memory."""
