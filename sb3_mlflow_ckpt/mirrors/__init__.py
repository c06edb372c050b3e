"""Owns the copies of runs elsewhere: what each service is sent, idempotently. Never imports stable-baselines3."""
