"""Where formatted decisions go."""
