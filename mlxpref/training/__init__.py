"""Preferences become rollouts, rewards, updates and an adapter."""
