"""Ranks and workers, the pages of memory that they share, and the machine that they run on."""
