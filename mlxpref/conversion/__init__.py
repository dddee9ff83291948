"""Converts and verifies Hugging Face folders; exports adapters."""
