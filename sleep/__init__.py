"""Sleep: consolidate, grow, free, dream, gate."""
