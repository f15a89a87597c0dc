"""Programs of others that run on our operators without being edited."""
