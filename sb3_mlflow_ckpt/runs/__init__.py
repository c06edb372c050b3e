"""Owns the training-run record: its document, and the readers over folders and MongoDB."""
