"""How much each alternative hurts."""
