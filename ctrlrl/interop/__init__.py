"""Adaptors that put ctrlrl's losses into other trainers; each needs its extra."""
