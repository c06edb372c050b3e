"""Owns the REST API and the pages of the Training History. Never imports torch, SB3 or MLflow."""
