"""Alembic migrations of the schema ``regtune``; Optuna migrates its own."""
