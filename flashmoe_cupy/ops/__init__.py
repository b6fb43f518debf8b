"""The public operations: arrays in, arrays of the same library out."""
