"""The model at θ + s·z: public directions, and parameters that are never written."""
