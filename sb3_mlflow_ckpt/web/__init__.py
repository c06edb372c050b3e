"""Owns what is served over HTTP: the REST API and the pages of the Training History."""
