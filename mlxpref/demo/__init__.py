"""The embedded demo: a small judge of coloured shapes, its pictures and its preferences."""

from pathlib import Path

JUDGE = Path(__file__).parent / "judge"
"""The demo judge's checkpoint, in the Hugging Face layout."""
TRAINING = Path(__file__).parent / "training.toml"
"""The settings by which the demo judge learns."""
