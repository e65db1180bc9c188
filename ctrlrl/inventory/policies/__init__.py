"""Policies on inventory networks, a file each."""
