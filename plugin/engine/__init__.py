"""Everything that knows DeepSpeed: what is changed in it (patches), read of it (internals, wrappers), and built on it."""
