"""The shared language of service and worker: what a study is, and how its trials change hands."""
