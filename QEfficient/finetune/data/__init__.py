"""From rows in any format to batches: sources → formats → encode → audit → batching → loader."""
