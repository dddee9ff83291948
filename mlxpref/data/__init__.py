"""Images and preferences in: files, folders, archives, prompts, public data sets."""
