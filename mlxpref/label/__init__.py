"""The local page on which a person states preferences."""
