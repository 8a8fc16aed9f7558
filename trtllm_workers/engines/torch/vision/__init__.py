"""Images in the torch engine: vision towers, and where an image's tokens stand."""
