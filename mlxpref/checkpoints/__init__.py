"""Model folders on disk, without an MLX model: find, download, read the config of any layout, check, plan memory."""
