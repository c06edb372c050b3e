"""Owns capture and restore: SB3 objects <-> plain arrays, tensors and JSON. Never unpickles."""
