"""May this run start? What is refused, and what is tried on made-up rows, before any data is read."""
