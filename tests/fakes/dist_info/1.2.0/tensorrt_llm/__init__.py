"""Nothing: the facts about it are read without importing it."""
