"""A Hugging Face folder becomes a converted folder, verified; adapters are exported."""
