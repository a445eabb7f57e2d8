"""Commands for a shard directory that is there: look into it, check it, write it anew; and the demo, that makes one."""
