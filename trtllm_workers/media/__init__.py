"""From what a request names to checked bytes: images and files of embeddings. Knows no model and no worker."""
