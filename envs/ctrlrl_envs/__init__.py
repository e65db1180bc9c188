"""Environments of ctrlrl; importing this package registers them with Gymnasium under ``ctrlrl/...``."""
