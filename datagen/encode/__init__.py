"""Planned samples to latents: decode, degrade and encode in Ray tasks."""
