"""The report: what was asked, what changed, the evidence, and what was not shown."""
