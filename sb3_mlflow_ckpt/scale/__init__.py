"""Training beyond one machine, on Ray. Nothing here imports Ray before it is used."""
