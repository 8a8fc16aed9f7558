"""Unit tests of the sim engine: no socket, no waiting."""
