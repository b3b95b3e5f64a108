"""Adapters: LoRA and its like, and quantized bases."""
