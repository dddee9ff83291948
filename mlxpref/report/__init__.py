"""Files for people: pages, curves, CSV."""
