"""Reports of a validation: HTML, Markdown, JSON, plots, DataFrame and model card."""
