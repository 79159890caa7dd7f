"""What every script shares: flags, result files, tables."""
