"""The hidden size: how a family carries the residual stream, proved by experiment, and parents with a narrower one."""
