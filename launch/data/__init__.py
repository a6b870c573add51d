"""Text in, packed batches out: sources, tokenizers and the grain pipeline."""
