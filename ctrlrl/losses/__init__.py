"""Policy-optimisation losses, one file each; the file's name is the key."""
