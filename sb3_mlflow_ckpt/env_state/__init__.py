"""Owns the state of single environments: recorded, captured and put back inside the process that steps them."""
