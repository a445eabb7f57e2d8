"""Which sample stands where in which batch, and what is read when: pure integers, no torch, no files."""
