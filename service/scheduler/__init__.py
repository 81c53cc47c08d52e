"""Decides what to try, what to stop, what to retry, and when a study is done."""
