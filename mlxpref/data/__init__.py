"""Reads images and preferences: files, folders, archives, prompts, public data sets."""
