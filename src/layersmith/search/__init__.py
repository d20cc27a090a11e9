"""From scores, costs and a budget to one alternative for every subblock."""
