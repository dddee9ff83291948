"""Model folders on disk: find, download, read configs of any layout, check, plan memory; without an MLX model."""
