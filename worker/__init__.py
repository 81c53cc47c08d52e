"""Leases trials and trains them together, as lanes of one batched model."""
