"""Moving messages: frames, the TCP mesh, discovery. Knows nothing of tokens' meaning."""
