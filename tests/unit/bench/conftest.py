"""The fixture that stands in for a server."""

from tests.unit.bench.fake_server import serve

__all__ = ["serve"]
