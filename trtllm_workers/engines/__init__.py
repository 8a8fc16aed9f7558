"""Engines behind one contract (``base.py``); they do not know each other."""
