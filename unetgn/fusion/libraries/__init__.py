"""Holds what `fuse` knows of each library, one module a library; importing a module registers it."""
