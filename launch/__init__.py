"""Programs: training, sampling, evaluation, and what they share."""
