"""One's own preferences, stated on a local page: what is asked, what is kept, and how much may be learned from it."""
