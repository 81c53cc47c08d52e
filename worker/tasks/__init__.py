"""What is trained: the built-in data sets and models, and how rows are prepared for training."""
