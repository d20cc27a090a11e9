"""The report of a run: one HTML page, its data as JSON, and the model card."""
