"""What files show a person: pages, curves, CSV."""
