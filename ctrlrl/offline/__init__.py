"""Methods that learn from recorded data, one file each."""
