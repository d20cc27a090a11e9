"""What alternatives and models cost: counted, measured or predicted; limits and workloads."""
