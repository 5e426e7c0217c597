"""What is learned from public text, before any private row is read."""
