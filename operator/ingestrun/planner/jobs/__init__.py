"""The Jobs of a run: their manifests, their images, and when they go."""
