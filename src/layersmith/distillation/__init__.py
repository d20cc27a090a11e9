"""Distillation: alternatives learn from the parent's subblocks, a child from the parent."""
