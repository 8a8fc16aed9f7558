"""What turns texts, images and embeddings into a prompt."""

from .loader import default_multimodal_input_loader

__all__ = ["default_multimodal_input_loader"]
