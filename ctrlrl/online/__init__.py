"""Methods with a loop or networks of their own: off-policy control and what is built on it."""
