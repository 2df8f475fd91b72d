"""The Jobs of a run: their manifests, their images, and their retention."""
