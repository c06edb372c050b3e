"""Owns training beyond one process, on Ray: the optional extra `[ray]`. Ray is imported where it is used."""
