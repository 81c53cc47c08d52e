"""What a task, data set or model is, and whether it can be trained here: `regtune task …`."""
