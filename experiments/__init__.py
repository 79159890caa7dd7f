"""Scripts: absl flags, one library call, a table, result.json and plots (floor 6)."""
