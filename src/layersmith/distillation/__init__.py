"""Distillation: alternatives learn from their parent subblocks, and a child from its parent."""
