"""Checkpoint to something a server runs: graphs, their runtimes, parity and bundles."""
