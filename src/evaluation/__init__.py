"""Numbers of one trained model: perplexity, tasks, latency and memory."""
