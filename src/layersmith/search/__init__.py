"""Search: from scores, costs and limits to one alternative for every subblock."""
