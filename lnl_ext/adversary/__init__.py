"""The bias head with its loss, heads for features of any shape, and weights of samples."""
